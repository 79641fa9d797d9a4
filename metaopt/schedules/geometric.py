"""Decays by a factor: continuously, or by steps."""

import math
from collections.abc import Callable

from metaopt import Example, Schedule, hookimpl, hyper


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

    known_as = ("StepLR",)
    start: float = hyper(doc="the value at the first update", known_as=("init_value",))
    step_size: int = hyper(ge=1, doc="updates between two decays")
    gamma: float = hyper(0.1, gt=0.0, doc="the factor of every decay")

    def curve(self, run: int | None, span: int | None) -> Callable[[float], float]:
        return lambda t: self.start * power(self.gamma, t // self.step_size)


class MultiStep(Schedule):
    """v(t) = start gamma^n, n being the number of milestones up to t."""

    known_as = ("MultiStepLR", "piecewise_constant_schedule")
    start: float = hyper(doc="the value at the first update", known_as=("init_value",))
    milestones: tuple[int | float, ...] = hyper(
        doc="the updates, or fractions of the run, at which the value decays", known_as=("boundaries_and_scales",)
    )
    gamma: float = hyper(0.1, gt=0.0, doc="the factor of every decay")

    def curve(self, run: int | None, span: int | None) -> Callable[[float], float]:
        updates = [self.resolve_steps(milestone, run, span, least=0) for milestone in self.milestones]
        return lambda t: self.start * power(self.gamma, sum(t >= milestone for milestone in updates))

    def length(self, run: int | None, span: int | None) -> int | None:
        return max((self.resolve_steps(milestone, run, span, least=0) for milestone in self.milestones), default=0)


@hookimpl
def metaopt_schedules() -> dict[str, type[Schedule]]:
    return {"exponential": Exponential, "step_decay": StepDecay, "multi_step": MultiStep}


@hookimpl
def metaopt_examples() -> dict[str, Example]:
    return {"multi_step": Example("multi_step(0.1, (10, 0.5))")}
