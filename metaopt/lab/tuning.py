"""Choosing values for the spaces of a spec on a problem: `metaopt tune`."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from metaopt.construction.building import build
from metaopt.errors import LogError, ProblemError, SpecError
from metaopt.lab.circumstances import circumstances, digest
from metaopt.lab.device import usable_device
from metaopt.lab.holding import held
from metaopt.lab.named import problem_named, text_of
from metaopt.lab.search import points, with_rate_space
from metaopt.lab.trial import Trial, cost_of_an_update
from metaopt.lab.whole_file import write_whole
from metaopt.lab.workers import Workers, begin_process
from metaopt.problem_class import Problem
from metaopt.space import Space
from metaopt.specs.parsing import parse, parse_value
from metaopt.specs.pipeline import as_pipeline
from metaopt.specs.spaces import spaces_of, with_values
from metaopt.tuner import Point, Task, Tried, Tuner

Progress = Callable[[int, int], None]

TRAINING_SEED = 1000  # that of no final run of a comparison
# gradient evaluations from which on most settings are given up early
LONG = 2000
PLAN, RESULTS = "tuning.json", "results.json"


@dataclass(frozen=True)
class Setting:
    """One setting that was tried: its values by path, the spec with them, and what came of it.

    `loss` is that on validation data, infinite where the run diverged or failed; `evaluations` are those of the
    gradient that were made for it. `whole` is false for a run that was stopped on its way; `failed`
    says why there is no result.
    """

    values: Mapping[str, Any]
    spec: str
    loss: float
    evaluations: int
    whole: bool
    failed: str | None


@dataclass(frozen=True)
class Tuning:
    """What a search found: the best setting, and all that were tried, in the order of the search."""

    problem: str
    spec: str
    method: str
    best: Setting
    trials: Sequence[Setting]

    @property
    def evaluations(self) -> int:
        """How often the gradient was evaluated in all."""
        return sum(trial.evaluations for trial in self.trials)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON has it; a loss that is not finite is None."""
        found = asdict(self) | {"evaluations": self.evaluations}
        for setting in (found["best"], *found["trials"]):
            setting["values"] = {path: _plain(value) for path, value in setting["values"].items()}
            setting["loss"] = setting["loss"] if math.isfinite(setting["loss"]) else None
        return found

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all. Raises LogError."""
        write_whole(path, json.dumps(self.to_dict(), indent=1) + "\n")


@dataclass
class ProblemTask(Task):
    """A search on a problem: each point is a trial, whose result lies in the folder before it counts."""

    problem: str
    spec: str
    trials: int
    seed: int
    jobs: int
    folder: Path
    budget: int
    device: str
    plugins: tuple[str, ...]
    common: str
    progress: Progress | None = field(default=None, repr=False)
    done: set[str] = field(default_factory=set, repr=False)
    known: dict[Tried, Trial] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only the process that shows progress has, and what is worked out anew."""
        kept = {name: value for name, value in self.__dict__.items() if name not in ("name", "spaces", "_made")}
        return {**kept, "progress": None, "done": set()}

    @cached_property
    def name(self) -> str:  # type: ignore[override]
        """A digest of the question: of all but how many trials are made, where and by how many processes."""
        return digest([self.problem, self.spec, self.seed, self.budget, self.device, self.common])

    def begin_process(self) -> None:
        begin_process(self.plugins)

    @cached_property
    def spaces(self) -> Mapping[str, Space]:  # type: ignore[override]
        """The spaces of the spec by path."""
        return spaces_of(parse(self.spec))

    @cached_property
    def _made(self) -> Problem:
        return problem_named(self.problem)

    def points(self, count: int) -> list[Point]:
        return points(len(self.spaces), count, self.seed)

    def spec_at(self, point: Point) -> str:
        """Return the spec with the values of a point."""
        return str(with_values(parse(self.spec), self.values(point)))

    def trial(self, tried: Tried) -> Trial:
        """Return the training run of a setting, with the schedule of a whole run also if it is stopped on its way."""
        if tried in self.known:
            return self.known[tried]
        spec = self.spec_at(tried.point)
        steps, cost = cost_of_an_update(self._made, spec, self.device, self.budget)
        updates = self.budget // cost
        budget = self.budget if tried.share >= 1.0 else cost * max(1, round(tried.share * updates))
        made = Trial(self.problem, spec, TRAINING_SEED, budget, updates, steps, self.device, self.common)
        return self.known.setdefault(tried, made)

    def losses(self, tried: Sequence[Tried]) -> list[float]:
        trials = [self.trial(each) for each in tried]
        found: dict[Trial, float] = {}
        with Workers(self.folder, self.jobs, self.plugins) as workers:
            for trial, result in workers.results(dict.fromkeys(trials)):
                found[trial] = loss_of(result)
                self.done.add(trial.key())
                if self.progress is not None:
                    self.progress(len(self.done), max(self.trials, len(self.done)))
        return [found[trial] for trial in trials]

    def loss(self, tried: Tried) -> float:
        trial = self.trial(tried)
        with Workers(self.folder, 1) as workers:
            return next(loss_of(result) for _, result in workers.results([trial]))

    def setting(self, tried: Tried) -> Setting:
        """Return what came of a setting that was tried."""
        trial = self.trial(tried)
        with Workers(self.folder, 1) as workers:
            _, result = next(iter(workers.results([trial])))
        whole, values = tried.share >= 1.0, self.values(tried.point)
        return Setting(values, trial.spec, loss_of(result), result["evaluations"], whole, result["failed"])


def loss_of(result: Mapping[str, Any]) -> float:
    """Return the final loss on validation data of a trial's result, infinite where there is none."""
    loss = result["validation"]["loss"]
    return math.inf if loss is None else float(loss)


def tune(
    spec: Any,
    *,
    problem: str | Problem = "digits",
    trials: int = 30,
    steps: int | None = None,
    method: str | None = None,
    seed: int = 0,
    jobs: int = 1,
    device: str = "cpu",
    out: Path | str = "runs/tune",
    plugins: Sequence[str] = (),
    progress: Progress | None = None,
) -> Tuning:
    """Choose values for the search spaces of a spec by training on a problem; return the best and all that was tried.

    `tune("adamw(lr=log(1e-4, 1e-1), betas=(choice(0.9, 0.95), 0.999))", problem="digits").best.spec` is text to paste.
    A spec without a space has its learning rate searched. `method` is a tuner as text, such as `sobol` or
    `halving(keep=4)`; by default halving for runs of 2,000 gradient evaluations or more, otherwise gp. Results are
    in `out`: a search that was interrupted goes on there, with the same outcome. Raises MetaoptError.
    """
    if trials < 2 or jobs < 1 or (steps is not None and steps < 1):
        raise ProblemError(f"trials must be 2 or more, jobs and steps 1 or more, got {trials}, {jobs} and {steps}")
    problem = text_of(problem, jobs)
    made, pipeline = problem_named(problem), with_rate_space(as_pipeline(spec))
    budget = steps or made.default_steps
    method = method or ("halving" if budget >= LONG else "gp")
    tuner = tuner_named(method)
    device = usable_device(device)
    common = digest(circumstances(problem, [pipeline], device, plugins))
    folder = Path(out)
    task = ProblemTask(
        problem=problem,
        spec=str(pipeline),
        trials=trials,
        seed=seed,
        jobs=jobs,
        folder=folder.absolute() / "trials",
        budget=budget,
        device=device,
        plugins=tuple(plugins),
        common=common,
        progress=progress,
    )
    _check_ends(task, made)
    with held(folder, "a search"), held(folder / "trials", "results"):
        _begin(task, method, folder)
        tried = [task.setting(each) for each in tuner.run(task)]
        found = Tuning(problem, task.spec, method, _best(tried), tried)
        found.save(folder / RESULTS)
    return found


def tuner_named(text: str) -> Tuner:
    """Return the tuner that a text names: `sobol`, or `sobol(near=0)`. Raises SpecError, UnknownPart."""
    from metaopt.registry import registry

    registry.find(text.partition("(")[0].strip(), "tuner")
    made = parse_value(text if "(" in text else f"{text}()")
    if not isinstance(made, Tuner):
        raise SpecError(f"the method must be a tuner, such as sobol or halving(keep=4), got {text!r:.60}")
    return made


def _check_ends(task: ProblemTask, problem: Problem) -> None:
    """Build a stack at the ends of every space: what only the base refuses is refused before anything is trained."""
    middle = {path: space.value(0.5) for path, space in task.spaces.items()}
    pipeline = parse(task.spec)
    model = problem.model(0, "cpu")
    for path, space in task.spaces.items():
        for end in space.ends():
            build(model.named_parameters(), with_values(pipeline, {**middle, path: end}), total_steps=task.budget)


def _begin(task: ProblemTask, method: str, folder: Path) -> None:
    """Write down what is searched, and refuse a folder in which another search was begun."""
    plan = {"spec": task.spec, "problem": task.problem, "budget": task.budget, "seed": task.seed, "method": method}
    try:
        earlier = json.loads((folder / PLAN).read_text())
    except (FileNotFoundError, ValueError):
        earlier = plan
    if earlier != plan:
        other = next(name for name in plan if not isinstance(earlier, dict) or earlier.get(name) != plan[name])
        raise LogError(f"{folder} holds a search with another {other}: choose another --out")
    write_whole(folder / PLAN, json.dumps(plan, indent=1) + "\n")


def _best(tried: Sequence[Setting]) -> Setting:
    best = min((setting for setting in tried if setting.whole), key=lambda setting: setting.loss)
    if math.isinf(best.loss):
        why = best.failed or f"{best.spec} diverged: search smaller learning rates"
        raise ProblemError(f"every trial diverged or failed, among them: {why}")
    return best


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | None) else repr(value)
