"""How many gradient evaluations a contender saves: what a difference in loss is worth."""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

Result = dict[str, Any]


def evaluations_saved(runs: Sequence[Result], baseline: Sequence[Result]) -> float:
    """Return the median over studies of how many evaluations earlier the better one has the other's final loss.

    Negative where the baseline is the better one. The losses are those on validation data along the runs.
    """
    return median(evaluations_saved_by_study(runs, baseline))


def evaluations_saved_by_study(runs: Sequence[Result], baseline: Sequence[Result]) -> list[float]:
    """Return the same number for each study."""
    return [_saved(run, other) for run, other in zip(runs, baseline, strict=True)]


def _saved(run: Result, other: Result) -> float:
    mine, its = _end(run), _end(other)
    if mine == its:
        return 0.0
    return _earlier(run, its) if mine < its else -_earlier(other, mine)


def _earlier(better: Result, goal: float) -> float:
    """Return how long before its end a run has reached a loss, interpolated between the points of its curve."""
    before: tuple[float, float] | None = None
    for at, loss in better["curve"]:
        if loss is not None and loss <= goal:
            if before is not None and math.isfinite(goal) and before[1] > loss:
                at = before[0] + (at - before[0]) * (before[1] - goal) / (before[1] - loss)
            return float(better["evaluations"] - at)
        before = (at, loss) if loss is not None else None
    return 0.0


def _end(run: Result) -> float:
    loss = run["validation"]["loss"]
    return math.inf if loss is None else float(loss)
