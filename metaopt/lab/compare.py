"""Which optimizer is better on a problem, as far as this run can tell."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from dataclasses import replace as changed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metaopt.errors import ProblemError, SpecError
from metaopt.lab.device import usable_device
from metaopt.lab.statistics import Verdict, verdicts
from metaopt.lab.trial import Trial, run_trial
from metaopt.registry import registry
from metaopt.schedule import Schedule
from metaopt.spec import parse

DEFAULT_SPECS = (
    "sgd(momentum=0.9)",
    "sgd(momentum=0.9) | lookahead(k=5)",
    "adamw",
    "adamw | lookahead(k=5)",
)
LOWEST, HIGHEST = 1e-3, 0.5
TUNING_SEEDS = (1000, 1001)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """What a comparison does: contenders, their common grid of rates, seeds and length."""

    problem: str
    specs: tuple[str, ...]
    baseline: int
    seeds: int
    steps: int
    rates: tuple[float, ...]
    tune: bool
    device: str
    out: Path
    jobs: int
    plugins: tuple[str, ...] = ()


@dataclass
class Contender:
    """One row of the report: the spec with its chosen rate, all its runs and the verdict on it."""

    spec: str
    expanded: str
    rate: float | None
    at_edge: bool
    tuning: dict[float, float]
    runs: list[dict[str, Any]]
    verdict: Verdict | None = None

    @property
    def losses(self) -> list[float]:
        """The final losses on test data, one per seed, infinite where a run diverged."""
        return [math.inf if run["evaluated"]["loss"] is None else run["evaluated"]["loss"] for run in self.runs]


def plan_comparison(
    *,
    problem: str,
    specs: Sequence[str],
    baseline: str | None,
    seeds: int,
    steps: int | None,
    lrs: int,
    tune: bool,
    device: str,
    out: Path,
    jobs: int,
    plugins: Sequence[str] = (),
) -> Plan:
    """Check what a user asked for, before anything is trained. Raises MetaoptError."""
    found = registry.find(problem, "problem").target()
    chosen = tuple(str(parse(spec)) for spec in (specs or DEFAULT_SPECS))
    if len(chosen) < 2:
        raise SpecError("a comparison needs two contenders or more: give -o SPEC twice")
    if len(set(chosen)) < len(chosen):
        raise SpecError("two contenders are the same: give each -o SPEC once")
    first = 0
    if baseline is not None:
        wanted = str(parse(baseline))
        if wanted not in chosen:
            raise SpecError(f"the baseline {wanted!r} is no contender: give it with -o as well")
        first = chosen.index(wanted)
    for value, what, least in ((seeds, "--seeds", 2), (lrs, "--lrs", 1), (jobs, "--jobs", 1)):
        if value < least:
            raise ProblemError(f"{what} {value} is too few: give {least} or more")
    if steps is not None and steps < 1:
        raise ProblemError(f"--steps {steps} is no number of updates: give 1 or more")
    for spec in chosen if tune else ():
        with_rate(spec, LOWEST)
    rates = tuple(float(rate) for rate in np.geomspace(LOWEST, HIGHEST, lrs))
    return Plan(
        problem,
        chosen,
        first,
        seeds,
        steps or found.default_steps,
        rates,
        tune,
        usable_device(device),
        out,
        jobs,
        tuple(plugins),
    )


def with_rate(spec: str, rate: float) -> str:
    """Return the spec with another learning rate. Raises SpecError where a schedule owns the rate."""
    pipeline = parse(spec)
    parts = []
    for part in pipeline:
        if part.kind == "optimizer":
            if isinstance(part.given.get("lr"), Schedule):
                raise SpecError(f"{spec}: a schedule owns the learning rate, so no grid can be tried: give --no-tune")
            part = changed(part, given={**part.given, "lr": rate})
        parts.append(part)
    return str(changed(pipeline, parts=tuple(parts)))


def run_comparison(plan: Plan, progress: Progress = lambda done, total: None) -> list[Contender]:
    """Tune every contender on validation data, train the chosen rates with other seeds, read the test data once.

    Finished trials lie in `<out>/trials`: an interrupted comparison continues where it stopped.
    """
    trials = str(plan.out / "trials")
    total = len(plan.specs) * (plan.seeds + (len(plan.rates) * len(TUNING_SEEDS) if plan.tune else 0))
    tuning = [
        Trial(plan.problem, with_rate(spec, rate), seed, plan.steps, plan.device)
        for spec in (plan.specs if plan.tune else ())
        for rate in plan.rates
        for seed in TUNING_SEEDS
    ]
    done = dict(_results(tuning, trials, plan, progress, 0, total))
    contenders = [_tuned(plan, spec, done) for spec in plan.specs]
    final = [
        Trial(plan.problem, contender.expanded, seed, plan.steps, plan.device, True, _log(plan, position, seed))
        for position, contender in enumerate(contenders)
        for seed in range(plan.seeds)
    ]
    found = dict(_results(final, trials, plan, progress, len(tuning), total))
    for position, contender in enumerate(contenders):
        contender.runs = [found[trial] for trial in final[position * plan.seeds : (position + 1) * plan.seeds]]
    for contender, verdict in zip(contenders, verdicts([c.losses for c in contenders], plan.baseline), strict=True):
        contender.verdict = verdict
    return contenders


def _log(plan: Plan, position: int, seed: int) -> str:
    return str(plan.out / "tensorboard" / f"contender-{position + 1}" / f"seed-{seed}")


def _tuned(plan: Plan, spec: str, done: dict[Trial, dict[str, Any]]) -> Contender:
    if not plan.tune:
        return Contender(spec, spec, None, False, {}, [])
    tuning: dict[float, float] = {}
    for rate in plan.rates:
        losses = [done[Trial(plan.problem, with_rate(spec, rate), s, plan.steps, plan.device)] for s in TUNING_SEEDS]
        values = [run["evaluated"]["loss"] for run in losses]
        tuning[rate] = math.inf if None in values else float(np.mean(values))
    best = min(tuning, key=lambda rate: tuning[rate])
    at_edge = len(plan.rates) > 1 and best in (plan.rates[0], plan.rates[-1])
    return Contender(spec, with_rate(spec, best), best, at_edge, tuning, [])


def _results(
    trials: Sequence[Trial], folder: str, plan: Plan, progress: Progress, before: int, total: int
) -> Iterator[tuple[Trial, dict[str, Any]]]:
    """Run trials, in this process or in `jobs` others, and yield each result as it comes."""
    for done, pair in enumerate(_unordered(trials, folder, plan), start=before + 1):
        progress(done, total)
        yield pair


def _unordered(trials: Sequence[Trial], folder: str, plan: Plan) -> Iterable[tuple[Trial, dict[str, Any]]]:
    if plan.jobs == 1:
        for trial in trials:
            yield trial, run_trial(trial, folder, plan.plugins)
        return
    # forked processes would inherit torch's threads in an undefined state
    with ProcessPoolExecutor(plan.jobs, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pending = {pool.submit(run_trial, trial, folder, plan.plugins): trial for trial in trials}
        for future in as_completed(pending):
            yield pending[future], future.result()
