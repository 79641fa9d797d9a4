"""What a comparison will do, checked before anything is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import numpy as np

from metaopt.errors import ProblemError, SpecError
from metaopt.lab.circumstances import circumstances, digest
from metaopt.lab.device import usable_device
from metaopt.lab.named import problem_named
from metaopt.lab.trial import Trial, cost_of_an_update
from metaopt.schedule import Schedule
from metaopt.specs.pipeline import Part, Pipeline, parse

DEFAULT_SPECS = (
    "sgd(momentum=0.9)",
    "sgd(momentum=0.9) | lookahead(k=5)",
    "adamw",
    "adamw | lookahead(k=5)",
)
LOWEST, HIGHEST = 1e-3, 0.5
TUNING_SEEDS = (1000, 1001)


@dataclass(frozen=True)
class Plan:
    """What a comparison does: contenders, their common grid of rates, seeds and budget of gradient evaluations."""

    problem: str
    specs: tuple[str, ...]
    updates: tuple[int, ...]
    steps: tuple[int, ...]
    baseline: int
    seeds: int
    budget: int
    rates: tuple[float, ...]
    tune: bool
    device: str
    out: Path
    jobs: int
    plugins: tuple[str, ...]
    circumstances: dict[str, Any]

    def trial(self, position: int, rate: float | None, seed: int, *, final: bool) -> Trial:
        """Return one run of a contender; a rate of None leaves the spec's own."""
        spec = self.specs[position] if rate is None else with_rate(self.specs[position], rate)
        common = digest(self.circumstances)
        updates, steps = self.updates[position], self.steps[position]
        return Trial(self.problem, spec, seed, self.budget, updates, steps, self.device, final, common)

    def tuning(self, position: int) -> dict[float, list[Trial]]:
        """Return the runs that choose a contender's rate: every rate of the grid with every tuning seed."""
        return {rate: [self.trial(position, rate, seed, final=False) for seed in TUNING_SEEDS] for rate in self.rates}


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
    lr_min: float = LOWEST,
    lr_max: float = HIGHEST,
    plugins: Sequence[str] = (),
) -> Plan:
    """Check what a user asked for; every contender makes one update, thrown away. Raises MetaoptError."""
    for value, what, least in ((seeds, "--seeds", 2), (lrs, "--lrs", 1), (jobs, "--jobs", 1)):
        if value < least:
            raise ProblemError(f"{what} must be {least} or more, got {value}")
    if steps is not None and steps < 1:
        raise ProblemError(f"--steps must be 1 or more gradient evaluations, got {steps}")
    rates = _grid(lr_min, lr_max, lrs) if tune else ()
    found = problem_named(problem)
    pipelines = [parse(spec) for spec in (specs or DEFAULT_SPECS)]
    chosen = tuple(str(pipeline) for pipeline in pipelines)
    if len(chosen) < 2:
        raise SpecError("a comparison needs two contenders or more: give -o SPEC twice")
    twice = next((spec for position, spec in enumerate(chosen) if spec in chosen[:position]), None)
    if twice is not None:
        raise SpecError(f"two contenders are the same, {twice}: give each -o SPEC once")
    first = _position(baseline, chosen)
    device, budget = usable_device(device), steps or found.default_steps
    costs = [cost_of_an_update(found, with_rate(spec, rates[0]) if tune else spec, device, budget) for spec in chosen]
    common = circumstances(problem, pipelines, device, plugins)
    return Plan(
        problem=problem,
        specs=chosen,
        updates=tuple(budget // evaluations for _, evaluations in costs),
        steps=tuple(steps for steps, _ in costs),
        baseline=first,
        seeds=seeds,
        budget=budget,
        rates=rates,
        tune=tune,
        device=device,
        out=out,
        jobs=jobs,
        plugins=tuple(plugins),
        circumstances=common,
    )


def _grid(lowest: float, highest: float, count: int) -> tuple[float, ...]:
    if not 0.0 < lowest <= highest < float("inf"):
        raise ProblemError(f"--lr-min must be > 0 and at most --lr-max, got {lowest:g} and {highest:g}")
    if (count == 1) != (lowest == highest):
        raise ProblemError(
            f"--lrs must be 1 if --lr-min equals --lr-max, and more than 1 otherwise, got {count} from {lowest:g} to "
            f"{highest:g}"
        )
    # three digits: nobody tunes finer, and the rates stay readable in names and legends
    return tuple(float(f"{rate:.3g}") for rate in np.geomspace(lowest, highest, count))


def _position(baseline: str | None, specs: Sequence[str]) -> int:
    if baseline is None:
        return 0
    wanted = str(parse(baseline))
    if wanted not in specs:
        raise SpecError(
            f"the baseline must be one of the contenders, got {wanted}: give it with -o as well, word for word"
        )
    return list(specs).index(wanted)


def with_rate(spec: str, rate: float) -> str:
    """Return the spec with another learning rate. Raises SpecError where it has none, or a schedule owns it."""
    pipeline = parse(spec)
    return str(changed(pipeline, parts=tuple(_with_rate(part, spec, rate) for part in pipeline)))


def _with_rate(part: Part, spec: str, rate: float) -> Part:
    if part.kind != "optimizer":
        return part
    if "lr" not in part.hyperparameters:
        raise SpecError(f"{spec}: {part.name} has no lr, so no grid can be tried: give --no-tune")
    if isinstance(part.arguments.get("lr"), Schedule):
        raise SpecError(f"{spec}: a schedule owns the learning rate, so no grid can be tried: give --no-tune")
    made: Part = part(lr=rate)
    return made


def given_rate(spec: str) -> float | None:
    """Return the learning rate that a spec gives itself, or None."""
    given = next((part.arguments.get("lr") for part in parse(spec) if part.kind == "optimizer"), None)
    return float(given) if isinstance(given, int | float) else None


def expanded(spec: str) -> str:
    """Return the spec with every hyperparameter that it leaves to a default: defaults change between versions."""
    return " | ".join(_expanded(part) for part in Pipeline(parse(spec).parts))


def _expanded(part: Part) -> str:
    values = {name: h.default for name, h in part.hyperparameters.items() if not h.required} | dict(part.arguments)
    label = {} if part.label is None else {"label": part.label}
    return f"{part.name}({', '.join(f'{name}={value!r}' for name, value in (values | label).items())})"
