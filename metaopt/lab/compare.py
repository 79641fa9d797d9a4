"""Which optimizer is better on a problem, as far as this run can tell."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from metaopt.lab.holding import held
from metaopt.lab.plan import Plan
from metaopt.lab.runs import Runs
from metaopt.lab.statistics import Verdict, verdicts
from metaopt.lab.trial import Trial
from metaopt.lab.workers import Workers

Progress = Callable[[int, int], None]
Result = dict[str, Any]


@dataclass
class Contender:
    """One row of the report: the spec, with its chosen rate as it was trained, all its runs and the verdict on it.

    `tuning` is the mean loss on validation data per rate, infinite where a run of the two diverged.
    """

    spec: str
    trained: str
    rate: float | None
    at_edge: bool
    tuning: dict[float, float]
    runs: list[Result]
    verdict: Verdict | None = None

    @property
    def losses(self) -> list[float]:
        """The final losses on test data of the weights that count, one per seed, infinite where a run diverged."""
        return [_loss(run) for run in self.runs]

    @property
    def diverged(self) -> int:
        """How many runs diverged."""
        return sum(math.isinf(loss) for loss in self.losses)


def run_comparison(plan: Plan, progress: Progress = lambda done, total: None) -> list[Contender]:
    """Tune every contender on validation data, train the chosen rates with other seeds, read the test data once.

    Finished trials lie in `<out>/trials`: an interrupted comparison continues where it stopped. TensorBoard's runs are
    written as trials finish. Raises MetaoptError.
    """
    runs = Runs(plan)
    contenders = range(len(plan.specs))
    grids = [plan.tuning(position) for position in contenders]
    tuning = [trial for grid in grids for trials in grid.values() for trial in trials]
    total = len(tuning) + len(plan.specs) * plan.seeds
    folder = plan.out / "trials"
    with (
        held(plan.out, "a comparison"),
        held(folder, "results"),
        Workers(folder, plan.jobs, plan.plugins) as workers,
    ):
        done: dict[Trial, Result] = {}
        for trial, result in workers.results(tuning):
            done[trial] = result
            progress(len(done), total)
        found = [_tuned(plan, position, grids[position], done) for position in contenders]
        final = {
            plan.trial(position, found[position].rate, seed, final=True): (position, seed)
            for position in contenders
            for seed in range(plan.seeds)
        }
        runs.begin()
        for trial, result in workers.results(final):
            done[trial] = result
            runs.write(*final[trial], result)
            progress(len(done), total)
    for trial, (position, _) in final.items():
        found[position].runs.append(done[trial])
    for contender, verdict in zip(found, verdicts([c.losses for c in found], plan.baseline), strict=True):
        contender.verdict = verdict
    for position in contenders:
        runs.write_median(position, found[position].runs)
    return found


def _tuned(plan: Plan, position: int, grid: dict[float, list[Trial]], done: dict[Trial, Result]) -> Contender:
    spec = plan.specs[position]
    if not plan.tune:
        return Contender(spec, spec, None, False, {}, [])
    tuning = {rate: float(np.mean([_loss(done[trial]) for trial in trials])) for rate, trials in grid.items()}
    best = min(tuning, key=lambda rate: tuning[rate])
    return Contender(spec, grid[best][0].spec, best, best in (plan.rates[0], plan.rates[-1]), tuning, [])


def _loss(run: Result) -> float:
    loss = run["evaluated"]["loss"]
    return math.inf if loss is None else float(loss)
