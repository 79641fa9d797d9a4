"""One training run of a comparison, in a process of its own where several run side by side."""

import hashlib
import json
import math
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from metaopt.building import build
from metaopt.registry import registry

POINTS = 20


@dataclass(frozen=True)
class Trial:
    """What is run: a problem, a spec with its learning rate, a seed, a length; `test` reads the test data once."""

    problem: str
    spec: str
    seed: int
    steps: int
    device: str
    test: bool = False
    log: str | None = None

    def key(self) -> str:
        """Return a name for the result's file that changes with anything that is run."""
        return hashlib.sha256(json.dumps({**asdict(self), "log": None}, sort_keys=True).encode()).hexdigest()[:24]


def run_trial(trial: Trial, folder: str, plugins: tuple[str, ...] = ()) -> dict[str, Any]:
    """Train and return the result; a result that lies in `folder` already is read, not made again."""
    path = Path(folder) / f"{trial.key()}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    for plugin in plugins:
        registry.load_plugin_module(plugin)
    result = {**asdict(trial), **train_once(trial)}
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps(result))
    scratch.replace(path)
    return result


def train_once(trial: Trial) -> dict[str, Any]:
    """Train once; return the curve on validation data and the final losses of the fast and the averaged weights."""
    problem = registry.find(trial.problem, "problem").target()
    model = problem.model(trial.seed, trial.device)
    opt = build(model, trial.spec, total_steps=trial.steps, log=trial.log)
    batches = problem.batches(trial.seed, trial.device)
    averages = any("averaged" in wrapper.acts_on() for wrapper in opt.wrappers)
    evaluations, curve, began = 0, [], time.perf_counter()

    def closure() -> torch.Tensor:
        nonlocal evaluations
        evaluations += 1
        opt.zero_grad()
        loss: torch.Tensor = problem.loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    every = max(1, trial.steps // POINTS)
    reached: int | None = None
    metric, goal = next(iter(problem.targets.items()), ("loss", -math.inf))
    for step in range(1, trial.steps + 1):
        batch = next(batches)
        opt.step(closure)
        if step % every and step != trial.steps:
            continue
        with opt.averaged() if averages else nullcontext():
            measured = problem.evaluate(model, "validation")
        curve.append((evaluations, _finite(measured["loss"])))
        met = measured[metric] <= goal if metric == "loss" else measured[metric] >= goal
        reached = evaluations if reached is None and met else reached
        if not math.isfinite(measured["loss"]):
            break
    seconds = time.perf_counter() - began
    split = "test" if trial.test else "validation"
    fast = problem.evaluate(model, split)
    with opt.averaged() if averages else nullcontext():
        shown = problem.evaluate(model, split)
    return {
        "curve": curve,
        "fast": {k: _finite(v) for k, v in fast.items()},
        "evaluated": {k: _finite(v) for k, v in shown.items()},
        "weights": "averaged" if averages else "fast",
        "reached": reached,
        "updates": opt.updates,
        "evaluations": evaluations,
        "seconds": seconds,
        "diverged": not math.isfinite(shown["loss"]),
    }


def _finite(value: float) -> float | None:
    """Return a number that JSON has; None stands for one that is not finite."""
    return value if math.isfinite(value) else None
