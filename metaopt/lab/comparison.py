"""Which optimizer is better on a problem, as far as these studies can tell."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from metaopt.lab.executors import LOCAL
from metaopt.lab.executors.driver import Driver
from metaopt.lab.holding import held, write_bytes
from metaopt.lab.ledger import Ledger, free_of_results
from metaopt.lab.looks import level_after
from metaopt.lab.moving import Moving, outermost
from metaopt.lab.plan import LEAST_TO_MOVE, Plan
from metaopt.lab.runs import Runs
from metaopt.lab.settings import rate_in
from metaopt.lab.statistics import Verdict, verdicts
from metaopt.lab.trial import Trial
from metaopt.lab.workers import Workers

Progress = Callable[[int, int], None]
Result = dict[str, Any]
# a third of the studies or more are best at an end, or within this part of the range from it: it may be too small
NEAR, OFTEN, LEAST = 0.1, 1 / 3, 2


@dataclass
class Study:
    """A contender tuned once: its trials by rate, in rising order, or by spec where it has spaces.

    What a user would keep of a tuning is its best run, the one with the least loss on validation data: `run` is the
    study's result.
    """

    number: int
    trials: dict[Any, Result]

    @property
    def best(self) -> Any:
        """The key of the best trial, the first of equal ones: its rate, or its spec where the contender has spaces."""
        return min(self.trials, key=lambda key: loss_of(self.trials[key], "validation"))

    @property
    def rate(self) -> float | None:
        """The learning rate of the best trial, or None."""
        return _rate_of(self.best, self.run)

    @property
    def run(self) -> Result:
        """The best trial."""
        return self.trials[self.best]

    def by_rate(self) -> list[tuple[float | None, Result, bool]]:
        """Return each trial with its learning rate, and whether it is the best."""
        best = self.best
        return [(_rate_of(key, trial), trial, key == best) for key, trial in self.trials.items()]


def _rate_of(key: Any, trial: Result) -> float | None:
    return rate_in(key, trial["updates"] or 1) if isinstance(key, str) else key


@dataclass
class Contender:
    """One row of the report: a spec with all its studies and the verdicts on it, on the loss and on the target.

    `edge` is "lowest" or "highest" where the studies were best near that end of the rates.
    """

    spec: str
    studies: list[Study]
    verdict: Verdict | None = None
    target_verdict: Verdict | None = None
    edge: str | None = None

    @property
    def runs(self) -> list[Result]:
        """The result of each study."""
        return [study.run for study in self.studies]

    @property
    def losses(self) -> list[float]:
        """The loss of each study on test data, of the weights that count; infinite where all its trials diverged."""
        return [loss_of(run, "test") for run in self.runs]

    @property
    def reached(self) -> list[float]:
        """After how many gradient evaluations each study met the target; infinite where it missed it."""
        return [math.inf if run["reached"] is None else float(run["reached"]) for run in self.runs]

    @property
    def trials(self) -> list[Result]:
        """All trials of all studies."""
        return [trial for study in self.studies for trial in study.trials.values()]


@dataclass
class Comparison:
    """A finished comparison: its plan, its contenders, where it is written, and how often its question was looked at.

    `earlier` holds the numbers of studies at which the same question was looked at before, without being declared.
    `at_sizes` holds what the same studies give with other batch sizes, if those were asked for.
    """

    plan: Plan
    contenders: list[Contender]
    folder: Path
    level: float
    earlier: list[int] = field(default_factory=list)
    at_sizes: dict[int, tuple[Plan, list[Contender]]] = field(default_factory=dict)

    @property
    def studies(self) -> int:
        """How many studies were made: at the look at which the comparison ended."""
        return len(self.contenders[0].studies)

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """The verdict on the loss of each contender but the baseline, by its spec."""
        return {c.spec: c.verdict for c in self.contenders if c.verdict is not None}

    @property
    def target_verdicts(self) -> dict[str, Verdict]:
        """The verdict on the time to the target of each contender but the baseline; none where nobody met it."""
        return {c.spec: c.target_verdict for c in self.contenders if c.target_verdict is not None}

    @property
    def trials(self) -> Any:
        """A row per trial, as trials.csv has them: a pandas DataFrame where pandas is installed, else a "
        "list of dicts."""
        from metaopt.lab.results import trial_rows

        rows = trial_rows(self)
        try:
            pandas = import_module("pandas")
        except ImportError:
            return rows
        return pandas.DataFrame(rows)

    def figure(self, name: str) -> Any:
        """Return a picture as a matplotlib Figure. Raises ProblemError.

        Names: "curves", "differences", "sensitivity", and "batch_size" where other batch sizes were trained.
        """
        from metaopt.lab.figures import figure

        return figure(self, name)

    def save(self, folder: Path | str | None = None, figures: Sequence[str] = ("png",)) -> list[Path]:
        """Write report, results, trials and pictures into the comparison's own folder, or another; return the files.

        Raises LogError where the other folder has files of these names.
        """
        from metaopt.lab.comparison_run import write_run
        from metaopt.lab.figures import pictures
        from metaopt.lab.results import write_results

        to = self.folder if folder is None else free_of_results(Path(folder))
        own = (self.folder / "tensorboard").is_dir() and to == self.folder  # a copy elsewhere has no runs
        drawn = pictures(self, [*figures, *(["png"] if own else [])])
        if own:
            write_run(self, {name.removesuffix(".png"): drawn[name] for name in drawn if name.endswith(".png")})
        asked = {to / name: content for name, content in drawn.items() if name.rpartition(".")[2] in figures}
        for path, content in asked.items():
            write_bytes(path, content)
        return [*write_results(self, to), *asked]

    def __str__(self) -> str:
        from metaopt.lab.report import markdown

        return markdown(self)

    @property
    def baseline(self) -> Contender:
        """The contender that the others are compared with."""
        return self.contenders[self.plan.baseline]


def run_comparison(
    plan: Plan,
    progress: Progress = lambda done, total: None,
    retry_failed: bool = False,
    all_seeds: bool = False,
) -> Comparison:
    """Make the studies of every contender; stop at the first declared look at which every verdict is clear.

    Finished trials lie in `<out>/trials`: an interrupted comparison continues where it stopped. TensorBoard gets a run
    per contender, and with `all_seeds` one per study as well. Raises MetaoptError.
    """
    trials, contenders = plan.out / "trials", range(len(plan.specs))
    with (
        held(plan.out, "a comparison"),
        held(trials, "results"),
        _workers(plan, trials, retry_failed) as workers,
    ):
        ledger = Ledger(plan.out)
        folder, earlier = ledger.enter(plan), ledger.earlier(plan)
        runs = Runs(plan, folder)
        found = Comparison(plan, [], folder, level_after(len(earlier), plan.looks), earlier)
        made: list[list[Moving]] = [[] for _ in contenders]
        done: dict[Trial, Result] = {}
        for studies in plan.looks:
            for position, row in enumerate(made):
                row += [Moving(plan, position, number) for number in range(len(row), studies)]
            _make([study for row in made for study in row], done, workers, progress)
            found.contenders = [_contender(plan, position, row, done) for position, row in enumerate(made)]
            judge(found)
            if all(c.verdict is None or c.verdict.word != "no difference shown" for c in found.contenders):
                break
        for size, other in plan.at_sizes:
            rows = [[Moving(other, position, number) for number in range(found.studies)] for position in contenders]
            _make([study for row in rows for study in row], done, workers, progress)
            found.at_sizes[size] = other, [_contender(other, position, row, done) for position, row in enumerate(rows)]
        runs.write(found.contenders, all_seeds)
        ledger.looked(plan, found.studies)
    return found


def _workers(plan: Plan, trials: Path, retry_failed: bool) -> Workers | Driver:
    if plan.on == LOCAL:
        return Workers(trials, plan.jobs, plan.plugins, retry_failed, plan.retries)
    return Driver(plan.on, trials, plan.jobs, plan.plugins, plan.retries, retry_failed)


def judge(comparison: Comparison) -> None:
    """Give every contender but the baseline its verdicts: on the loss, and on the time to the target."""
    contenders, baseline, level = comparison.contenders, comparison.plan.baseline, comparison.level
    losses = verdicts([c.losses for c in contenders], baseline, level)
    times = verdicts([c.reached for c in contenders], baseline, level)
    met = any(math.isfinite(at) for c in contenders for at in c.reached)
    for contender, loss, time in zip(contenders, losses, times, strict=True):
        contender.verdict = loss
        contender.target_verdict = time if met else None


def _make(studies: Sequence[Moving], done: dict[Trial, Result], workers: Workers | Driver, progress: Progress) -> None:
    """Train what the studies ask for, until none of them moves on."""
    while studies:
        asked = dict.fromkeys(trial for study in studies for trial in study.trials.values())
        missing = [trial for trial in asked if trial not in done]
        total = len(done) + len(missing)
        for trial, result in workers.results(missing):
            done[trial] = result
            progress(len(done), total)
        losses = {trial: loss_of(done[trial], "validation") for trial in asked}
        studies = [study for study in studies if study.moves_on(losses)]


def _contender(plan: Plan, position: int, studies: Sequence[Moving], done: dict[Trial, Result]) -> Contender:
    made = [Study(s.number, {key: done[trial] for key, trial in s.trials.items()}) for s in studies]
    return Contender(plan.specs[position], made, edge=_edge(plan, made))


def _edge(plan: Plan, studies: Sequence[Study]) -> str | None:
    """Return at which end of the rates too many studies were best, "lowest" or "highest", or None."""
    sides = [_side(plan, study, study.best) for study in studies if isinstance(study.best, float)]
    for name, side in (("lowest", -1), ("highest", 1)):
        if sides.count(side) >= max(LEAST, OFTEN * len(sides)):
            return name
    return None


def _side(plan: Plan, study: Study, best: float) -> int:
    """Return -1 or 1 where a study was best at its lowest or its highest rate, or near an end of all rates; else 0."""
    losses = [loss_of(run, "validation") for run in study.trials.values()]
    low, high = plan.reach
    near = NEAR * math.log(plan.highest / plan.lowest)
    if math.log(best / low) < near:
        return -1
    if math.log(high / best) < near:
        return 1
    return outermost(losses) if len(losses) >= LEAST_TO_MOVE else 0


def loss_of(run: Result, split: str) -> float:
    """Return the loss of a trial at its end, infinite where it diverged or failed."""
    loss = run[split]["loss"]
    return math.inf if loss is None else float(loss)
