"""The two pictures of a comparison: loss over the run, and final loss against learning rate."""

import math

import numpy as np
from matplotlib.figure import Figure

from metaopt.lab.compare import Contender, Plan


def draw_curves(plan: Plan, contenders: list[Contender]) -> None:
    """Draw curves.png: validation loss against gradient evaluations, median and quartiles over seeds."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for contender in contenders:
        curves = [run["curve"] for run in contender.runs if not run["diverged"]]
        if not curves:
            continue
        x = [point[0] for point in curves[0]]
        y = np.array([[math.nan if point[1] is None else point[1] for point in curve] for curve in curves])
        low, middle, high = np.nanquantile(y, [0.25, 0.5, 0.75], axis=0)
        axes.plot(x, middle, label=contender.expanded)
        axes.fill_between(x, low, high, alpha=0.2)
    axes.set(xlabel="gradient evaluations", ylabel="validation loss", yscale="log", title=plan.problem)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(plan.out / "curves.png", dpi=120)


def draw_sensitivity(plan: Plan, contenders: list[Contender]) -> None:
    """Draw sensitivity.png: validation loss after tuning against learning rate, the chosen rate marked."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for contender in contenders:
        points = {rate: loss for rate, loss in contender.tuning.items() if math.isfinite(loss)}
        (line,) = axes.plot(list(points), list(points.values()), marker=".", label=contender.spec)
        if contender.rate in points:
            axes.plot(contender.rate, points[contender.rate], marker="o", markersize=10, color=line.get_color())
    axes.set(xlabel="learning rate", ylabel="validation loss", xscale="log", yscale="log", title=plan.problem)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(plan.out / "sensitivity.png", dpi=120)
