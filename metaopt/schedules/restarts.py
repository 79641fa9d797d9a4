"""Cosine with warm restarts."""

import math
from collections.abc import Callable

from metaopt import Schedule, hookimpl, hyper


class CosineRestarts(Schedule):
    """v = end + (start - end) (1 + cos(pi c / T)) / 2, c updates into a cycle of T = first mult^i. arXiv:1608.03983"""

    known_as = ("CosineAnnealingWarmRestarts", "sgdr_schedule")
    start: float = hyper(doc="the value at every restart")
    first: int = hyper(ge=1, doc="updates in the first cycle", known_as=("T_0",))
    mult: int = hyper(1, ge=1, doc="how much longer each cycle is than the one before", known_as=("T_mult",))
    end: float = hyper(0.0, doc="the value that each cycle approaches", known_as=("eta_min",))

    def curve(self, run: int | None, span: int | None) -> Callable[[float], float]:
        def value(t: float) -> float:
            done, cycle = 0, self.first
            if self.mult == 1:
                done = int(t // cycle) * cycle
            while t - done >= cycle:
                done, cycle = done + cycle, cycle * self.mult
            return self.end + (self.start - self.end) * (1.0 + math.cos(math.pi * (t - done) / cycle)) / 2.0

        return value


@hookimpl
def metaopt_schedules() -> dict[str, type[Schedule]]:
    return {"cosine_restarts": CosineRestarts}
