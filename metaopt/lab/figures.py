"""The two pictures of a comparison: loss over the run, and final loss against learning rate."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metaopt.lab.compare import Contender
from metaopt.lab.plan import Plan

# told apart by form as well as by colour (Okabe and Ito's, which the colour-blind see too)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def draw_curves(plan: Plan, contenders: Sequence[Contender]) -> None:
    """Draw curves.png: validation loss against gradient evaluations, median and quartiles over seeds."""
    figure, axes = _empty(f"{plan.problem}: median and quartiles of {plan.seeds} seeds")
    for position, contender in enumerate(contenders):
        x, runs = _on_one_grid(contender.runs)
        # whole runs, not means of two: one of them may be infinite
        low, middle, high = np.quantile(runs, [0.25, 0.5, 0.75], axis=0, method="closest_observation")
        color, line = COLORS[position % len(COLORS)], LINES[position % len(LINES)]
        axes.plot(x, _finite(middle), line, color=color, label=_label(contender, plan), linewidth=1.8)
        axes.fill_between(x, _finite(low), _finite(high), color=color, alpha=0.12, linewidth=0)
    axes.set(xlabel="gradient evaluations", ylabel="validation loss", yscale="log")
    _finish(figure, axes, plan, "curves.png")


def draw_sensitivity(plan: Plan, contenders: Sequence[Contender]) -> None:
    """Draw sensitivity.png: validation loss after tuning against learning rate, the chosen rate marked."""
    figure, axes = _empty(f"{plan.problem}: loss after tuning runs; filled: the chosen rate; x: diverged")
    finite = [loss for contender in contenders for loss in contender.tuning.values() if math.isfinite(loss)]
    top = max(finite, default=1.0) * 1.6
    for position, contender in enumerate(contenders):
        color, line = COLORS[position % len(COLORS)], LINES[position % len(LINES)]
        marker = MARKERS[position % len(MARKERS)]
        rates, losses = np.array(list(contender.tuning)), np.array(list(contender.tuning.values()))
        axes.plot(rates, _finite(losses), line, marker=marker, mfc="white", color=color, label=contender.spec)
        lost = ~np.isfinite(losses)
        # side by side where several contenders diverge at one rate
        aside = 1.0 + 0.06 * (position - (len(contenders) - 1) / 2)
        if lost.any():
            axes.plot(rates[lost] * aside, np.full(lost.sum(), top), "x", color=color, markersize=8)
        chosen = rates == contender.rate
        axes.plot(rates[chosen & ~lost], losses[chosen & ~lost], marker, color=color, markersize=11, zorder=3)
    axes.set(xlabel="learning rate", ylabel="validation loss", xscale="log", yscale="log")
    _finish(figure, axes, plan, "sensitivity.png")


def _empty(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 5.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize="medium", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finish(figure: Figure, axes: Axes, plan: Plan, name: str) -> None:
    axes.grid(alpha=0.25, which="both", linewidth=0.6)
    # below the axes: a legend inside hides curves, and specs are long
    figure.legend(loc="outside lower left", fontsize="small", frameon=False)
    figure.savefig(plan.out / name, dpi=150)


def _label(contender: Contender, plan: Plan) -> str:
    lost = f" ({contender.diverged} of {plan.seeds} diverged)" if contender.diverged else ""
    return f"{contender.trained}{lost}"


def _on_one_grid(runs: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the x of all runs and a row of losses per run: interpolated, and infinite from where it diverged."""
    x = np.array(sorted({at for run in runs for at, _ in run["curve"]}), dtype=float)
    rows = np.full((len(runs), len(x)), math.inf)
    for row, run in zip(rows, runs, strict=True):
        known = [(at, loss) for at, loss in run["curve"] if loss is not None]
        if known:
            row[:] = np.interp(x, [at for at, _ in known], [loss for _, loss in known])
            row[(x > known[-1][0]) & run["diverged"]] = math.inf
    return x, rows


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, math.nan)
