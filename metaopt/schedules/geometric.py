"""Decays by a factor: continuously, or by steps."""

import math
from collections.abc import Callable

from metaopt import Schedule, hookimpl, hyper


def power(gamma: float, exponent: float) -> float:
    """Return gamma^exponent, or infinity beyond the largest float: such a rate diverges, it does not crash."""
    try:
        return float(gamma**exponent)
    except OverflowError:
        return math.inf


class Exponential(Schedule):
    """v(t) = start gamma^t."""

    known_as = ("ExponentialLR", "exponential_decay")
    start: float = hyper(doc="the value at the first update", known_as=("init_value",))
    gamma: float = hyper(gt=0.0, doc="the factor of every update", known_as=("decay_rate",))

    def curve(self, run: int | None, span: int | None) -> Callable[[float], float]:
        return lambda t: self.start * power(self.gamma, t)


class StepDecay(Schedule):
    """v(t) = start gamma^floor(t / step_size)."""

    known_as = ("StepLR", "piecewise_constant_schedule")
    start: float = hyper(doc="the value at the first update", known_as=("init_value",))
    step_size: int = hyper(ge=1, doc="updates between two decays")
    gamma: float = hyper(0.1, gt=0.0, doc="the factor of every decay")

    def curve(self, run: int | None, span: int | None) -> Callable[[float], float]:
        return lambda t: self.start * power(self.gamma, t // self.step_size)


@hookimpl
def metaopt_schedules() -> dict[str, type[Schedule]]:
    return {"exponential": Exponential, "step_decay": StepDecay}
