"""One training run of a comparison, within a budget of gradient evaluations."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from metaopt.construction.building import build
from metaopt.errors import MetaoptError, ProblemError
from metaopt.lab.circumstances import digest
from metaopt.lab.named import problem_named
from metaopt.lab.telling import told
from metaopt.lab.weights import FAST, evaluated, shown
from metaopt.logger import HyperValue, Logger
from metaopt.problem_class import Problem
from metaopt.stack import Stack

POINTS = 20
# a loss that has grown by so many times the initial one has exploded
EXPLODED = 9.0


@dataclass(frozen=True)
class Trial:
    """What is run: a problem, a spec with its learning rate, a seed, a budget of gradient evaluations.

    `updates` is how many updates the budget pays for, `steps` how many `step()`s each takes: more than one where
    gradients are accumulated. `circumstances` is the rest, hashed.
    """

    problem: str
    spec: str
    seed: int
    budget: int
    updates: int
    steps: int
    device: str
    circumstances: str

    def key(self) -> str:
        """Return a name for the result's file that changes with anything that is run."""
        return digest(asdict(self))


class Points(Logger):
    """Keeps what a run logs, for its file of results."""

    def __init__(self) -> None:
        self.hparams: dict[str, HyperValue] = {}
        self.values: dict[int, dict[str, float | None]] = {}

    def open(self, *, step: int, tags: Sequence[str], spec: str, hparams: Mapping[str, HyperValue]) -> None:
        self.hparams = dict(hparams)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.values.setdefault(step, {}).update({tag: _finite(value) for tag, value in values.items()})


class _Run:
    """A model, its stack and its batches, with the gradient evaluations counted."""

    def __init__(self, problem: Problem, spec: str, seed: int, device: str, total_steps: int, **log: Any) -> None:
        torch.manual_seed(seed)
        self.problem = problem
        self.model = problem.model(seed, device)
        # parameters, not the module: nobody could follow build's hint about decay here
        self.opt: Stack = build(self.model.named_parameters(), spec, total_steps=total_steps, **log)
        self.opt.train()
        self.evaluations = 0
        self._batches = problem.batches(seed, device)
        self._batch: Any = None

    def update(self, steps: int = 1) -> Any:
        """Make one update, in so many steps; return the loss of the last."""
        loss = None
        for _ in range(steps):
            self._batch = next(self._batches)
            loss = self.opt.step(self._closure)
        return loss

    def _closure(self) -> torch.Tensor:
        self.evaluations += 1
        self.opt.zero_grad()
        loss = self.problem.loss(self.model, self._batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss


def cost_of_an_update(problem: Problem, spec: str, device: str, budget: int) -> tuple[int, int]:
    """Return how many steps and how many gradients an update takes, seen at a first one, which is thrown away.

    One of each for most, two gradients for SAM, several steps where gradients are accumulated. Raises MetaoptError,
    also where the budget of gradients makes no update.
    """
    with told(f"{spec} cannot train {type(problem).__name__.lower()}"):
        run = _Run(problem, spec, 0, device, budget)
        steps = 0
        while not run.opt.updates and run.evaluations < budget:
            run.update()
            steps += 1
    if run.evaluations > budget or not run.opt.updates:
        why = "" if run.opt.skipped is None else f" ({run.opt.skipped})"
        raise ProblemError(f"{spec}: an update takes more gradient evaluations than --steps {budget}{why}")
    return steps, run.evaluations


def run_trial(trial: Trial) -> dict[str, Any]:
    """Train once; return the curve on validation data, and the final numbers on validation and on test data.

    A run that raised, or ran out of memory, is a result as well: `failed` says why, and it counts as diverged.
    """
    try:
        with told(f"{trial.spec} cannot train {trial.problem}, seed {trial.seed}"):
            return {**asdict(trial), **_run(trial), "failed": None}
    except MetaoptError as error:
        return failed(trial, str(error))


def failed(trial: Trial, reason: str) -> dict[str, Any]:
    """Return the result of a trial that has none of its own."""
    lost: dict[str, Any] = {"loss": None}
    return {
        **asdict(trial),
        "curve": [],
        "points": [],
        "hparams": {},
        "validation": lost,
        "test": lost,
        "fast": lost,
        "weights": FAST,
        "reached": None,
        "updates": 0,
        "evaluations": 0,
        "seconds": 0.0,
        "memory": {"parameters": 0, "state": 0, "peak": None},
        "diverged": True,
        "failed": reason,
    }


def has_diverged(loss: float, initial: float) -> bool:
    """Tell whether a run has diverged: its loss is not finite, or above the initial weights' by ten times that loss.

    The rule for both is on validation data: loss > initial + 9 |initial|. An initial loss of 0 sets no limit.
    """
    return not math.isfinite(loss) or (initial != 0.0 and loss > initial + EXPLODED * abs(initial))


def _run(trial: Trial) -> dict[str, Any]:
    problem = problem_named(trial.problem)
    if trial.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(trial.device)
    points = Points()
    every = max(1, trial.updates // POINTS)
    run = _Run(problem, trial.spec, trial.seed, trial.device, trial.updates, log=points, log_every=every)
    initial = problem.evaluate(run.model, "validation")["loss"]
    per_update = max(1, trial.budget // trial.updates)
    watched = _Target(problem)
    curve: list[tuple[int, float | None]] = []
    measured: dict[str, float] = {"loss": initial}
    seconds, began = 0.0, time.perf_counter()
    while run.evaluations + per_update <= trial.budget:
        run.update(trial.steps)
        last = run.evaluations + per_update > trial.budget
        if run.opt.updates % every and not last:
            continue
        _settle(trial.device)
        seconds += time.perf_counter() - began
        measured = _evaluate(run, "validation")
        points.scalars(run.opt.updates, {f"validation/{name}": value for name, value in measured.items()})
        curve.append((run.evaluations, _finite(measured["loss"])))
        watched.look(run.evaluations, measured)
        if not math.isfinite(measured["loss"]):
            break
        began = time.perf_counter()
    run.opt.close()
    fast = problem.evaluate(run.model, "test")
    test = fast if evaluated(run.opt) == FAST else _evaluate(run, "test")
    diverged = has_diverged(measured["loss"], initial) or not math.isfinite(test["loss"])
    return {
        "curve": curve,
        "points": sorted(points.values.items()),
        "hparams": points.hparams,
        # a run that diverged has no final numbers, whatever its weights give
        "validation": _numbers(measured, diverged),
        "test": _numbers(test, diverged),
        "fast": _numbers(fast, False),
        "weights": evaluated(run.opt),
        "reached": watched.reached,
        "updates": run.opt.updates,
        "evaluations": run.evaluations,
        "seconds": seconds,
        "memory": _memory(run, trial.device),
        "diverged": diverged,
    }


class _Target:
    """When a run meets the problem's target: at the first point after which the next, if there is one, meets it too."""

    def __init__(self, problem: Problem) -> None:
        self.metric, self.goal = next(iter(problem.targets.items()), ("loss", -math.inf))
        self.reached: int | None = None
        self._confirmed = False

    def look(self, evaluations: int, measured: Mapping[str, float]) -> None:
        value = measured[self.metric]
        met = value <= self.goal if self.metric == "loss" else value >= self.goal
        if self._confirmed:
            return
        if met and self.reached is not None:
            self._confirmed = True
        else:
            self.reached = evaluations if met else None


def _numbers(measured: Mapping[str, float], lost: bool) -> dict[str, float | None]:
    return {name: None if lost else _finite(value) for name, value in measured.items()}


def _evaluate(run: _Run, split: str) -> dict[str, float]:
    with shown(run.opt):
        return run.problem.evaluate(run.model, split)


def _memory(run: _Run, device: str) -> dict[str, int | None]:
    """Return the bytes of the parameters and of what the optimizer keeps; on an accelerator the most that was used."""
    kept = [value for state in run.opt.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    peak = torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else None
    return {"parameters": _bytes(run.model.parameters()), "state": _bytes(kept), "peak": peak}


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _settle(device: str) -> None:
    """Wait for what was queued on an accelerator: its time belongs to the training, not to the evaluation."""
    if not device.startswith("cpu"):
        torch.accelerator.synchronize(torch.device(device))  # it need not be the current one


def _finite(value: float) -> float | None:
    """Return a number that JSON has; None stands for one that is not finite."""
    return value if math.isfinite(value) else None
