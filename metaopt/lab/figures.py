"""The pictures of a comparison: loss over the run, paired differences, and final loss against learning rate.

Contenders are told apart by line and marker as well as by colour, so that a page printed in grey can be read.
"""

import io
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from metaopt.errors import ProblemError
from metaopt.lab.bands import quartiles
from metaopt.lab.comparison import Comparison, Contender
from metaopt.lab.statistics import paired_differences

# Okabe and Ito's, which the colour-blind see too
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
FORMS = ("png", "pdf", "svg")
INCHES = (8.0, 5.4)


def curves(comparison: Comparison) -> Figure:
    """Return validation loss against gradient evaluations, median and quartiles over the studies' best runs."""
    plan = comparison.plan
    figure, axes = _empty(f"{plan.problem}: median and quartiles of {comparison.studies} studies")
    for position, contender in enumerate(comparison.contenders):
        x, runs = _on_one_grid(contender.runs)
        if not len(x):
            continue
        low, middle, high = quartiles(runs)
        style = _style(position)
        markevery = (position % 3, max(1, len(x) // 6))
        axes.plot(x, _finite(middle), label=_label(contender), markevery=markevery, linewidth=1.8, **style)
        axes.fill_between(x, _finite(low), _finite(high), color=style["color"], alpha=0.15, linewidth=0)
    axes.set(xlabel="gradient evaluations", ylabel="validation loss", yscale="log")
    _log_ticks(axes.yaxis)
    return _finished(figure, axes)


def differences(comparison: Comparison) -> Figure:
    """Return the difference in test loss from the baseline, a point per study, with its pseudo-median and interval."""
    plan = comparison.plan
    others = [c for c in comparison.contenders if c is not comparison.baseline]
    figure, axes = _empty(f"{plan.problem}: test loss less that of {comparison.baseline.spec}, study by study")
    shown = {c.spec: paired_differences(c.losses, comparison.baseline.losses) for c in others}
    sizes = [abs(d) for ds in shown.values() for d in ds if math.isfinite(d)]
    edge = 1.15 * max(sizes, default=1.0) or 1.0
    for position, contender in enumerate(comparison.contenders):
        if contender.verdict is None:
            continue
        row, verdict = list(shown).index(contender.spec), contender.verdict
        style = _style(position)
        values = np.clip(shown[contender.spec], -edge, edge)
        spread = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else np.zeros(1)
        axes.plot(values, row + spread, style["marker"], color=style["color"], mfc="white", alpha=0.9)
        ends = np.clip([verdict.low, verdict.high], -edge, edge)
        axes.plot(ends, [row + 0.3] * 2, "-", color=style["color"], linewidth=2.2)
        axes.plot(np.clip(verdict.difference, -edge, edge), row + 0.3, "d", color=style["color"], markersize=8)
        axes.annotate(
            verdict.word, (0.995, row + 0.3), xycoords=("axes fraction", "data"), ha="right", fontsize="small"
        )
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(others)), [_wrapped(c.spec) for c in others])
    axes.set(xlabel="difference in test loss (left is better); at the edge: diverged", xlim=(-edge, edge))
    axes.set_ylim(len(others) - 0.5, -0.5)
    axes.grid(alpha=0.25, linewidth=0.6, axis="x")
    return figure


def sensitivity(comparison: Comparison) -> Figure:
    """Return validation loss against learning rate, a point per trial, the best one of each study filled."""
    figure, axes = _empty(f"{comparison.plan.problem}: a point per trial; filled: the best of its study; x: diverged")
    losses = [t["validation"]["loss"] for c in comparison.contenders for t in c.trials]
    top = max((loss for loss in losses if loss is not None), default=1.0) * 1.6
    for position, contender in enumerate(comparison.contenders):
        style = _style(position) | {"linestyle": "none"}
        points = [
            (rate, trial["validation"]["loss"], rate == study.rate)
            for study in contender.studies
            for rate, trial in study.trials.items()
            if rate is not None
        ]
        looks: tuple[tuple[bool, dict[str, Any]], ...]
        looks = ((False, {"mfc": "white", "alpha": 0.6, "markersize": 5}), (True, {"markersize": 7}))
        for chosen, look in looks:
            kept = [(rate, loss) for rate, loss, best in points if loss is not None and best == chosen]
            label: dict[str, Any] = {"label": _wrapped(contender.spec, 90)} if chosen else {}
            axes.plot([rate for rate, _ in kept], [loss for _, loss in kept], **style, **look, **label)
        lost = [rate for rate, loss, _ in points if loss is None]
        # side by side where several contenders diverge at one rate
        axes.plot(lost, [top * 1.08**position] * len(lost), "x", color=style["color"], markersize=7)
    axes.set(xlabel="learning rate", ylabel="validation loss", xscale="log", yscale="log")
    _log_ticks(axes.xaxis)
    _log_ticks(axes.yaxis)
    return _finished(figure, axes)


FIGURES: dict[str, Callable[[Comparison], Figure]] = {
    "curves": curves,
    "differences": differences,
    "sensitivity": sensitivity,
}


def figure(comparison: Comparison, name: str) -> Figure:
    """Return one picture by its name. Raises ProblemError."""
    if name not in FIGURES:
        raise ProblemError(f"a figure must be one of {', '.join(FIGURES)}, got {name!r}")
    return FIGURES[name](comparison)


def pictures(comparison: Comparison, forms: Iterable[str]) -> dict[str, bytes]:
    """Return every picture that the comparison has in each form, by the name of its file. Raises ProblemError."""
    forms = list(dict.fromkeys(forms))
    check_forms(forms)
    names = [name for name in FIGURES if comparison.plan.tune or name != "sensitivity"]
    return {f"{name}.{form}": content for name in names for form, content in _drawn(comparison, name, forms)}


def _drawn(comparison: Comparison, name: str, forms: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    drawn = figure(comparison, name)
    for form in forms:
        yield form, _bytes(drawn, form)


def check_forms(forms: Sequence[str]) -> None:
    """Raise ProblemError for a form of picture that cannot be written."""
    for form in forms:
        if form not in FORMS:
            raise ProblemError(f"--figures must be {', '.join(FORMS[:-1])} or {FORMS[-1]}, got {form!r}")


def _bytes(drawn: Figure, form: str) -> bytes:
    content = io.BytesIO()
    dates = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(form, {})
    # the same picture is the same file
    with rc_context({"svg.hashsalt": "metaopt"}):
        drawn.savefig(content, format=form, dpi=150, metadata=dates)
    return content.getvalue()


def _style(position: int) -> dict[str, Any]:
    at = position % len(COLORS)
    return {"color": COLORS[at], "linestyle": LINES[at], "marker": MARKERS[at]}


def _empty(title: str) -> tuple[Figure, Axes]:
    made = Figure(figsize=INCHES, layout="constrained")
    axes = made.add_subplot()
    axes.set_title(_wrapped(title, 95), fontsize="medium", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return made, axes


def _finished(made: Figure, axes: Axes) -> Figure:
    axes.grid(alpha=0.25, which="both", linewidth=0.6)
    # below the axes: a legend inside hides curves, and specs are long
    made.legend(loc="outside lower left", fontsize="small", frameon=False)
    return made


def _log_ticks(axis: Any) -> None:
    """Label 1, 2 and 5 of each decade: a range of less than one would have a single number."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _label(contender: Contender) -> str:
    lost = sum(map(math.isinf, contender.losses))
    return _wrapped(contender.spec, 90) + (f" ({lost} of {len(contender.losses)} diverged)" if lost else "")


def _wrapped(text: str, width: int = 28) -> str:
    return "\n".join(textwrap.wrap(text, width, break_long_words=False)) or text


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
