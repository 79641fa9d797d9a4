"""A learning rate that falls when a metric no longer improves."""

import math
from collections.abc import Callable
from typing import Any, Literal

from metaopt import Example, Groups, Wrapper, counter, hookimpl, hyper, number


class Plateau(Wrapper):
    """lr <- max(factor lr, min_lr) if the metric has not improved more than `patience` times in a row.

    The metric is what the user records: `opt.record(val_loss=loss)` after each validation, on every rank the same. The
    rule is that of torch's ReduceLROnPlateau. A schedule of the rate, with or without a warm-up, goes on by the same
    factor; the factor, the best value and the counts are in the checkpoint.
    """

    known_as = ("ReduceLROnPlateau", "reduce_on_plateau", "PlateauLRScheduler", "reduce_lr_on_plateau")

    metric: str = hyper(
        doc="the name under which the metric is recorded, such as 'val_loss'", known_as=("monitor",), per_group=False
    )
    factor: float = hyper(0.1, gt=0.0, lt=1.0, doc="what the rate is multiplied with", per_group=False)
    patience: int = hyper(10, ge=0, doc="how many values in a row may bring no improvement", per_group=False)
    mode: Literal["min", "max"] = hyper(
        "min", choices=("min", "max"), doc="whether a lower or a higher value is better", per_group=False
    )
    threshold: float = hyper(
        1e-4, ge=0.0, doc="by how much a value must be better", known_as=("rtol", "atol"), per_group=False
    )
    threshold_mode: Literal["rel", "abs"] = hyper(
        "rel", choices=("rel", "abs"), doc="whether the threshold is a share of the best value", per_group=False
    )
    cooldown: int = hyper(0, ge=0, doc="how many values after a fall are not counted", per_group=False)
    min_lr: float = hyper(0.0, ge=0.0, doc="the rate below which it does not fall", per_group=False)
    eps: float = hyper(1e-8, ge=0.0, doc="a fall of the rate that is not larger is left out", per_group=False)
    best = number(math.inf, "the best value so far; with mode='max' its negative")
    worse = counter("how many values in a row brought no improvement")
    cooling = counter("how many values are yet to be left uncounted")

    def on_record(self, groups: Groups, name: str, value: Any) -> None:
        if name != groups.metric:
            return
        value, worse, cooling = float(value), groups.worse + 1, groups.cooling
        sign = 1.0 if groups.mode == "min" else -1.0
        if sign * value < sign * _bound(groups, sign * groups.best, sign):
            groups.set_counter("best", sign * value)
            worse = 0
        if cooling:
            cooling, worse = cooling - 1, 0
        if worse > groups.patience:
            groups.change_lr(_fall(groups))
            cooling, worse = groups.cooldown, 0
        groups.set_counter("worse", worse)
        groups.set_counter("cooling", cooling)


def _bound(groups: Groups, best: float, sign: float) -> float:
    """Return the value from which on there is no improvement."""
    if groups.threshold_mode == "abs":
        return float(best - sign * groups.threshold)
    return float(best * (1.0 - sign * groups.threshold))


def _fall(groups: Groups) -> Callable[[float], float]:
    factor, lowest, eps = groups.factor, groups.min_lr, groups.eps

    def fallen(lr: float) -> float:
        lower = max(lr * factor, lowest)
        return lower if lr - lower > eps else lr

    return fallen


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"plateau": Plateau}


@hookimpl
def metaopt_examples() -> dict[str, Example]:
    return {"plateau": Example("plateau('val_loss')")}
