"""One training run of a comparison, within a budget of gradient evaluations."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from metaopt.construction.building import build
from metaopt.errors import ProblemError
from metaopt.lab.circumstances import digest
from metaopt.lab.named import problem_named
from metaopt.lab.telling import told
from metaopt.lab.weights import FAST, evaluated, shown
from metaopt.logger import HyperValue, Logger
from metaopt.problem import Problem
from metaopt.stack import Stack

POINTS = 20


@dataclass(frozen=True)
class Trial:
    """What is run: a problem, a spec with its learning rate, a seed, a budget of gradient evaluations.

    `updates` is how many updates the budget pays for, `steps` how many `step()`s each takes: more than one where
    gradients are accumulated. A `final` run is looked at as it goes and reads the test data
    once; one that only tunes is evaluated at its end, on validation data. `circumstances` is the rest, hashed.
    """

    problem: str
    spec: str
    seed: int
    budget: int
    updates: int
    steps: int
    device: str
    final: bool
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
    """Train once; return the final losses of the fast and the evaluated weights, and the curve of a final run.

    Raises MetaoptError, for whatever the optimizer or the problem raised.
    """
    with told(f"{trial.spec} cannot train {trial.problem}, seed {trial.seed}"):
        return {**asdict(trial), **_run(trial)}


def _run(trial: Trial) -> dict[str, Any]:
    problem = problem_named(trial.problem)
    points = Points()
    every = max(1, trial.updates // POINTS)
    log = {"log": points, "log_every": every} if trial.final else {}
    run = _Run(problem, trial.spec, trial.seed, trial.device, trial.updates, **log)
    per_update = max(1, trial.budget // trial.updates)
    metric, goal = next(iter(problem.targets.items()), ("loss", -math.inf))
    curve: list[tuple[int, float | None]] = []
    reached: int | None = None
    diverged = False
    seconds, began = 0.0, time.perf_counter()
    while run.evaluations + per_update <= trial.budget:
        loss = run.update(trial.steps)
        last = run.evaluations + per_update > trial.budget
        if run.opt.updates % every and not last:
            continue
        _settle(trial.device)
        seconds += time.perf_counter() - began
        if trial.final:
            measured = _evaluate(run, "validation")
            points.scalars(run.opt.updates, {f"validation/{name}": value for name, value in measured.items()})
            curve.append((run.evaluations, _finite(measured["loss"])))
            met = measured[metric] <= goal if metric == "loss" else measured[metric] >= goal
            reached = run.evaluations if reached is None and met else reached
            loss = torch.tensor(measured["loss"])
        diverged = not bool(loss.isfinite())
        if diverged:
            break
        began = time.perf_counter()
    run.opt.close()
    split = "test" if trial.final else "validation"
    fast = problem.evaluate(run.model, split)
    measured = fast if evaluated(run.opt) == FAST else _evaluate(run, split)
    diverged = diverged or not math.isfinite(measured["loss"])
    return {
        "curve": curve,
        "points": sorted(points.values.items()),
        "hparams": points.hparams,
        "fast": {name: _finite(value) for name, value in fast.items()},
        # a run that was stopped has no final loss, whatever its weights give
        "evaluated": {name: None if diverged else _finite(value) for name, value in measured.items()},
        "weights": evaluated(run.opt),
        "reached": reached,
        "updates": run.opt.updates,
        "evaluations": run.evaluations,
        "seconds": seconds,
        "diverged": diverged,
    }


def _evaluate(run: _Run, split: str) -> dict[str, float]:
    with shown(run.opt):
        return run.problem.evaluate(run.model, split)


def _settle(device: str) -> None:
    """Wait for what was queued on an accelerator: its time belongs to the training, not to the evaluation."""
    if not device.startswith("cpu"):
        torch.accelerator.synchronize()


def _finite(value: float) -> float | None:
    """Return a number that JSON has; None stands for one that is not finite."""
    return value if math.isfinite(value) else None
