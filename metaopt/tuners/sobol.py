"""Quasi-random search, which fills a space more evenly than random numbers; its last part near the best so far."""

import math

from metaopt import Space, Task, Tried, Tuner, hookimpl, hyper

# trials between two looks at which setting is the best
ROUND = 5
# the reach of the first round around the best, as a share of each axis, and by how much it shrinks
REACH, SHRINK = 0.15, 0.6
# how often a later trial keeps an option whose neighbours mean nothing
KEPT = 0.7


class Sobol(Tuner):
    """A scrambled Sobol sequence over the whole space, then boxes around the best setting that become smaller.

    It needs no other package, and the same seed tries the same settings with any number of processes.
    """

    known_as = ("quasi_random", "QMCSampler", "ldc")
    near: float = hyper(0.4, ge=0.0, lt=1.0, doc="the share of the trials that are made near the best so far")

    def run(self, task: Task) -> list[Tried]:
        points = task.points(task.trials)
        first = task.trials - int(self.near * task.trials)
        tried = [Tried(point) for point in points[:first]]
        losses = task.losses(tried)
        reach = REACH
        while len(tried) < task.trials:
            best = tried[losses.index(min(losses))].point
            step = [
                Tried(_near(best, point, reach, list(task.spaces.values())))
                for point in points[len(tried) : len(tried) + ROUND]
            ]
            tried += step
            losses += task.losses(step)
            reach *= SHRINK
        return tried


def _near(best: tuple[float, ...], point: tuple[float, ...], reach: float, spaces: list[Space]) -> tuple[float, ...]:
    found = []
    for center, u, space in zip(best, point, spaces, strict=True):
        if space.options() is not None and not space.ordered:
            found.append(center if u < KEPT else (u - KEPT) / (1.0 - KEPT))
            continue
        low, high = max(0.0, center - reach), min(1.0, center + reach)
        found.append(math.fsum((low, u * (high - low))))
    return tuple(found)


@hookimpl
def metaopt_tuners() -> dict[str, type[Tuner]]:
    return {"sobol": Sobol}
