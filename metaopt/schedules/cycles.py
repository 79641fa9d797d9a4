"""Rates that go up and down: cyclic, and one cycle over the whole run."""

import math
from collections.abc import Callable
from typing import Literal

from metaopt import HyperparameterError, Schedule, hookimpl, hyper


class Cyclic(Schedule):
    """v(t) = low + (high - low) max(0, 1 - |2 x - 1|) s, x the part of the cycle done. arXiv:1506.01186

    s = 1 (triangular), 2^-cycle (triangular2) or gamma^t (exp_range).
    """

    known_as = ("CyclicLR",)
    low: float = hyper(doc="the value at both ends of a cycle", known_as=("base_lr",))
    high: float = hyper(doc="the value in the middle of a cycle", known_as=("max_lr",))
    up: int = hyper(2000, ge=1, doc="updates from low to high", known_as=("step_size_up",))
    down: int | None = hyper(None, ge=1, doc="updates from high to low; None: as many", known_as=("step_size_down",))
    mode: Literal["triangular", "triangular2", "exp_range"] = hyper(
        "triangular", choices=("triangular", "triangular2", "exp_range"), doc="how the height changes"
    )
    gamma: float = hyper(1.0, gt=0.0, doc="the factor of every update in exp_range")

    def curve(self, run: int | None, span: int | None) -> Callable[[float], float]:
        total = self.up + (self.up if self.down is None else self.down)
        turn = self.up / total

        def value(t: float) -> float:
            cycle = t // total
            x = t / total - cycle
            height = x / turn if x <= turn else (x - 1.0) / (turn - 1.0)
            return float(self.low + (self.high - self.low) * height * self._scale(cycle, t))

        return value

    def _scale(self, cycle: float, t: float) -> float:
        if self.mode == "triangular":
            return 1.0
        try:
            return float(0.5**cycle if self.mode == "triangular2" else self.gamma**t)
        except OverflowError:  # a rate that grows so far diverges, it does not crash
            return math.inf


class OneCycle(Schedule):
    """v rises from peak / div_factor to peak, then falls to that / final_div_factor, by half cosines. arXiv:1708.07120

    As torch counts, the peak is at update pct_start steps - 1 and the end at steps - 1. In optax, both come one update
    later: cosine_onecycle_schedule has its peak at update pct_start steps and its end at steps.
    """

    known_as = ("OneCycleLR", "cosine_onecycle_schedule")
    peak: float = hyper(doc="the largest value", known_as=("max_lr", "peak_value"))
    pct_start: float = hyper(0.3, gt=0.0, lt=1.0, doc="the part of the run that rises")
    div_factor: float = hyper(25.0, gt=0.0, doc="peak / first value")
    final_div_factor: float = hyper(1e4, gt=0.0, doc="first value / last value")
    anneal: Literal["cos", "linear"] = hyper(
        "cos", choices=("cos", "linear"), doc="the form of both parts", known_as=("anneal_strategy",)
    )
    steps: int | float | None = hyper(None, doc="updates, a fraction of the run, or None: to its end")

    def curve(self, run: int | None, span: int | None) -> Callable[[float], float]:
        steps = self.resolve_steps(self.steps, run, span)
        top, last = self.pct_start * steps - 1.0, steps - 1.0
        if top <= 0:
            raise HyperparameterError(f"one_cycle: pct_start={self.pct_start} of {steps} updates leaves none to rise")
        first = self.peak / self.div_factor

        def between(start: float, end: float, x: float) -> float:
            if self.anneal == "linear":
                return start + (end - start) * x
            return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * x))

        def value(t: float) -> float:
            t = min(t, last)
            if t <= top:
                return between(first, self.peak, t / top)
            return between(self.peak, first / self.final_div_factor, (t - top) / (last - top))

        return value


@hookimpl
def metaopt_schedules() -> dict[str, type[Schedule]]:
    return {"cyclic": Cyclic, "one_cycle": OneCycle}
