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
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from metaopt.errors import ProblemError
from metaopt.lab.bands import quartiles
from metaopt.lab.comparison import Comparison, Contender
from metaopt.lab.report import word_of
from metaopt.lab.sensitivity import over_batch_sizes
from metaopt.lab.statistics import paired_differences

# Okabe and Ito's, which the colour-blind see too
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
FORMS = ("png", "pdf", "svg")
# small, so that the letters are large where a page shows the picture small
INCHES = (6.6, 4.8)
# letters of a line of the title, and of the legend
TITLE, LEGEND = 80, 72


def curves(comparison: Comparison) -> Figure:
    """Return validation loss against gradient evaluations, median and quartiles over the studies' best runs."""
    plan = comparison.plan
    figure, axes = _empty(f"{plan.problem}: median and quartiles of {comparison.studies} studies")
    drawn = [(c, *_on_one_grid(c.runs)) for c in comparison.contenders]
    bands = {position: (x, quartiles(runs)) for position, (_, x, runs) in enumerate(drawn) if len(x)}
    # a run that explodes leaves the picture: the others are what there is to see
    starts = [abs(middle[0]) for _, (_, middle, _) in bands.values() if math.isfinite(middle[0])]
    shown = [value for _, band in bands.values() for value in band.ravel() if value <= 10 * min(starts, default=1.0)]
    top = 100 * abs(max(shown, default=1.0))
    for position, (x, (low, middle, high)) in bands.items():
        style = _style(position)
        # contenders' marks are not above one another
        every = max(1, len(x) // 6)
        marked = slice(position * every // len(drawn), None, every)
        label = _label(comparison.contenders[position])
        middle = np.where(np.isfinite(middle), middle, math.nan)
        axes.plot(x, middle, label=label, markevery=marked, linewidth=1.8, markersize=5, **style)
        # a quarter of the studies diverged: the band has no upper end
        high = np.minimum(high, top)
        axes.fill_between(x, low, high, where=np.isfinite(low), color=style["color"], alpha=0.12, linewidth=0)
        # shades of grey are hard to tell apart where bands overlap
        lengths = np.abs(np.stack([middle - low, high - middle]))[:, marked]
        axes.errorbar(x[marked], middle[marked], lengths, fmt="none", ecolor=style["color"], capsize=2.5, elinewidth=1)
    axes.set(xlabel="gradient evaluations", ylabel="validation loss")
    _scale(axes.yaxis, shown)
    return _finished(figure, axes)


def differences(comparison: Comparison) -> Figure:
    """Return the difference in test loss from the baseline, a point per study, with its pseudo-median and interval."""
    others = [c for c in comparison.contenders if c.verdict is not None]
    figure, axes = _empty(f"{comparison.plan.problem}: test loss less that of {comparison.baseline.spec}")
    figure.set_figheight(1.4 + 1.1 * len(others))
    shown = [paired_differences(c.losses, comparison.baseline.losses) for c in others]
    sizes = [abs(d) for ds in shown for d in ds if math.isfinite(d)]
    edge = 1.15 * max(sizes, default=1.0) or 1.0
    for row, (contender, values) in enumerate(zip(others, shown, strict=True)):
        verdict, style = contender.verdict, _style(comparison.contenders.index(contender))
        if verdict is None:
            continue
        # specs are long: above the points, not beside the axes
        said = f"{contender.spec}: {word_of(comparison, contender)}"
        axes.annotate(
            _wrapped(said, LEGEND), (0.01, row - 0.46), xycoords=("axes fraction", "data"), va="top", fontsize="small"
        )
        spread = np.linspace(0.0, 0.2, len(values)) if len(values) > 1 else np.zeros(1)
        at_edge = np.clip(values, -edge, edge)
        axes.plot(at_edge, row + spread, style["marker"], color=style["color"], mfc="white", markersize=5)
        low, middle, high = (float(np.clip(d, -edge, edge)) for d in (verdict.low, verdict.difference, verdict.high))
        lengths = [[middle - low], [high - middle]]
        axes.errorbar(middle, row + 0.34, xerr=lengths, fmt="d", color=style["color"], capsize=4, linewidth=2)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks([])
    lost = not all(math.isfinite(d) for ds in shown for d in ds)
    explained = "open: a study; filled: the difference with its interval" + ("; at the edge: diverged" if lost else "")
    axes.set(xlabel=f"difference in test loss (left is better)\n{explained}")
    axes.set(xlim=(-1.03 * edge, 1.03 * edge), ylim=(len(others) - 0.5, -0.5))
    axes.grid(alpha=0.25, linewidth=0.6, axis="x")
    return figure


def sensitivity(comparison: Comparison) -> Figure:
    """Return validation loss against learning rate, a point per trial, the best one of each study filled."""
    trials = [trial for contender in comparison.contenders for trial in contender.trials]
    losses = [t["validation"]["loss"] for t in trials if t["validation"]["loss"] is not None]
    diverged = "; x: diverged" if len(losses) < len(trials) else ""
    figure, axes = _empty(f"{comparison.plan.problem}: a point per trial; filled: the best of its study{diverged}")
    lost: list[tuple[list[float], str]] = []
    for position, contender in enumerate(comparison.contenders):
        style = _style(position) | {"linestyle": "none"}
        points = [
            (rate, trial["validation"]["loss"], best)
            for study in contender.studies
            for rate, trial, best in study.by_rate()
            if rate is not None
        ]
        looks: tuple[tuple[bool, dict[str, Any]], ...]
        looks = ((False, {"mfc": "white", "alpha": 0.6, "markersize": 4}), (True, {"markersize": 6}))
        for chosen, look in looks:
            kept = [(rate, loss) for rate, loss, best in points if loss is not None and best == chosen]
            label: dict[str, Any] = {"label": _wrapped(contender.spec, LEGEND)} if chosen else {}
            axes.plot([rate for rate, _ in kept], [loss for _, loss in kept], **style, **look, **label)
        lost.append(([rate for rate, loss, _ in points if loss is None], style["color"]))
    axes.set(xlabel="learning rate", ylabel="validation loss")
    _scale(axes.xaxis, [rate for c in comparison.contenders for s in c.studies for rate, *_ in s.by_rate() if rate])
    # above the points there is a line for each contender that diverged
    lost = [(rates, color) for rates, color in lost if rates]
    _scale(axes.yaxis, losses, room=0.04 * len(lost))
    for line, (rates, color) in enumerate(lost):
        at = [0.98 - 0.035 * line] * len(rates)
        axes.plot(rates, at, "x", color=color, markersize=5, transform=axes.get_xaxis_transform())
    return _finished(figure, axes)


def batch_size(comparison: Comparison) -> Figure:
    """Return test loss against batch size, median and quartiles over studies, all over as many samples.

    Raises ProblemError where no other batch size was trained.
    """
    if not comparison.at_sizes:
        raise ProblemError("no other batch size was trained: give --sensitivity lr,batch_size")
    found = over_batch_sizes(comparison)
    sizes = [entry["batch_size"] for entry in found]
    figure, axes = _empty(f"{comparison.plan.problem}: other batch sizes over as many samples, median and quartiles")
    for position, contender in enumerate(comparison.contenders):
        entries, style = [entry["contenders"][position] for entry in found], _style(position)
        middle = np.array([entry["median"] if math.isfinite(entry["median"]) else math.nan for entry in entries])
        low, high = np.array([entry["quartiles"] for entry in entries]).T
        lengths = np.abs(np.where(np.isfinite([low, high]), [middle - low, high - middle], 0.0))
        # bars of contenders are not above one another
        at = np.array(sizes) * 1.03 ** (position - (len(comparison.contenders) - 1) / 2)
        axes.errorbar(at, middle, lengths, label=_label(contender), capsize=3, linewidth=1.8, markersize=5, **style)
    shown = [v for e in found for c in e["contenders"] for v in (c["median"], *c["quartiles"]) if math.isfinite(v)]
    _scale(axes.yaxis, shown)
    axes.set(xscale="log", xlabel="batch size", ylabel="test loss")
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    return _finished(figure, axes)


FIGURES: dict[str, Callable[[Comparison], Figure]] = {
    "curves": curves,
    "differences": differences,
    "sensitivity": sensitivity,
    "batch_size": batch_size,
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
    missing = {"sensitivity": not comparison.plan.tune, "batch_size": not comparison.at_sizes}
    names = [name for name in FIGURES if not missing.get(name, False)]
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
    axes.set_title(_wrapped(title, TITLE), fontsize="medium", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return made, axes


def _finished(made: Figure, axes: Axes) -> Figure:
    axes.grid(alpha=0.25, which="both", linewidth=0.6)
    # below the axes: a legend inside hides curves, and specs are long
    made.legend(loc="outside lower left", fontsize="small", frameon=False)
    return made


def _scale(axis: Any, values: Sequence[float], room: float = 0.0) -> None:
    """Make an axis logarithmic if its values allow it, with at least three labelled ticks in the range of the values.

    `room` is left free at the upper end, as a share of the axis.
    """
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return
    if min(known) <= 0.0:
        span = max(known) - min(known) or 1.0
        axis.axes.set(**{f"{axis.axis_name}lim": (min(known) - 0.03 * span, max(known) + (0.03 + room) * span)})
        return
    # a margin, and three ticks have to fit in where all values are the same
    span = 1.05 * max(known) / min(known)
    low, high = min(known) / 1.05 / span**0.03, max(known) * 1.05 * span ** (0.03 + room)
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    ticks = log_ticks(low, high)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axis.set_minor_formatter(NullFormatter())


def log_ticks(low: float, high: float) -> list[float]:
    """Return three to eight round numbers between two positive ones: few decades have more ticks each than many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        found = [f * 10.0**d for d in range(first, last + 1) for f in factors if low <= f * 10.0**d <= high]
        if len(found) >= 3:
            return found[:: -(-len(found) // 8)]
    return [tick for tick in MaxNLocator(6, min_n_ticks=4).tick_values(low, high) if low <= tick <= high]


def _label(contender: Contender) -> str:
    lost = sum(map(math.isinf, contender.losses))
    return _wrapped(contender.spec, LEGEND) + (f" ({lost} of {len(contender.losses)} diverged)" if lost else "")


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
