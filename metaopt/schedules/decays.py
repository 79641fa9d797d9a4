"""Monotone decays over a length: linear, polynomial, cosine."""

import math
from collections.abc import Callable

from metaopt import Schedule, hookimpl, hyper


class Linear(Schedule):
    """v(t) = start + (end - start) min(t / steps, 1)."""

    known_as = ("LinearLR", "linear_schedule")
    start: float = hyper(doc="the value at the first update", known_as=("init_value", "start_factor"))
    end: float = hyper(doc="the value after `steps` updates", known_as=("end_value", "end_factor"))
    steps: int | float | None = hyper(None, doc="updates, a fraction of the run, or None: to its end")

    def curve(self, run: int | None, span: int | None) -> Callable[[float], float]:
        steps = self.resolve_steps(self.steps, run, span)
        return lambda t: self.start + (self.end - self.start) * min(t / steps, 1.0)


class Polynomial(Schedule):
    """v(t) = end + (start - end) (1 - min(t / steps, 1))^power."""

    known_as = ("PolynomialLR", "polynomial_schedule")
    start: float = hyper(doc="the value at the first update", known_as=("init_value",))
    end: float = hyper(0.0, doc="the value after `steps` updates", known_as=("end_value",))
    power: float = hyper(1.0, gt=0.0, doc="the exponent; 1 is linear")
    steps: int | float | None = hyper(None, doc="updates, a fraction of the run, or None: to its end")

    def curve(self, run: int | None, span: int | None) -> Callable[[float], float]:
        steps = self.resolve_steps(self.steps, run, span)
        return lambda t: self.end + (self.start - self.end) * (1.0 - min(t / steps, 1.0)) ** self.power


class Cosine(Schedule):
    """v(t) = end + (start - end) (1 + cos(pi min(t / steps, 1))) / 2: half a cosine, no restart. arXiv:1608.03983"""

    known_as = ("CosineAnnealingLR", "cosine_decay_schedule")
    start: float = hyper(doc="the value at the first update", known_as=("init_value", "base_lr"))
    end: float = hyper(0.0, doc="the value after `steps` updates", known_as=("eta_min", "end_value"))
    steps: int | float | None = hyper(
        None, doc="updates, a fraction of the run, or None: to its end", known_as=("T_max", "decay_steps")
    )

    def curve(self, run: int | None, span: int | None) -> Callable[[float], float]:
        steps = self.resolve_steps(self.steps, run, span)
        return lambda t: self.end + (self.start - self.end) * (1.0 + math.cos(math.pi * min(t / steps, 1.0))) / 2.0


@hookimpl
def metaopt_schedules() -> dict[str, type[Schedule]]:
    return {"linear": Linear, "polynomial": Polynomial, "cosine": Cosine}
