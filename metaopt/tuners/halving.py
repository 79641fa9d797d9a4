"""Successive halving: many settings begin, the worse ones are given up early."""

import math

from metaopt import Task, Tried, Tuner, hookimpl, hyper


class Halving(Tuner):
    """Train all settings for a part of the run, the better ones for longer, the best to its end. arXiv:1502.07943

    One of `keep` settings goes on from each rung, `keep` times as far. The settings are those of a scrambled Sobol
    sequence. A run has the schedule of the whole run and is stopped on its way; one that goes on is trained again from
    its beginning, so that the last rung is what a whole run is.
    """

    known_as = ("SuccessiveHalvingPruner", "ASHA", "HyperbandPruner")
    keep: int = hyper(3, ge=2, doc="one of so many settings goes on", known_as=("reduction_factor", "eta"))
    rungs: int = hyper(3, ge=2, doc="how often a choice is made, the last one included")

    def run(self, task: Task) -> list[Tried]:
        points = task.points(task.trials)
        found: list[Tried] = []
        for rung in range(self.rungs):
            tried = [Tried(point, float(self.keep) ** (rung + 1 - self.rungs)) for point in points]
            losses = task.losses(tried)
            found += tried
            best = sorted(range(len(points)), key=losses.__getitem__)
            points = [points[position] for position in best[: math.ceil(len(points) / self.keep)]]
        return found


@hookimpl
def metaopt_tuners() -> dict[str, type[Tuner]]:
    return {"halving": Halving}
