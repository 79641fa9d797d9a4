"""What a comparison will do, checked before anything is trained."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metaopt.errors import ProblemError, SpecError
from metaopt.lab.batch_sizes import BATCH_SIZE, LR, resized, sensitivities
from metaopt.lab.circumstances import circumstances, digest
from metaopt.lab.device import usable_device
from metaopt.lab.executors import LOCAL, RETRIES
from metaopt.lab.looks import auto_looks, pocock
from metaopt.lab.named import problem_named
from metaopt.lab.placement import placed
from metaopt.lab.power import MOST_STUDIES, detectable, fewest_studies, studies_for
from metaopt.lab.rates import with_rate
from metaopt.lab.settings import cost_of_settings, searches, settings
from metaopt.lab.trial import Trial, cost_of_an_update
from metaopt.problem_class import Problem
from metaopt.specs.parsing import parse
from metaopt.specs.pipeline import Part, Pipeline

DEFAULT_SPECS = (
    "sgd(momentum=0.9)",
    "sgd(momentum=0.9) | lookahead(k=5)",
    "adamw",
    "adamw | lookahead(k=5)",
)
LOWEST, HIGHEST = 1e-3, 0.5
STUDIES, TRIALS = 10, 5
# of two rates one is always outermost
LEAST_TO_MOVE = 3


@dataclass(frozen=True)
class Plan:
    """What a comparison does: contenders, studies of so many trials each, and a budget of gradient evaluations.

    A study is a contender tuned once: `trials` rates between `lowest` and `highest`, placed at random by the study and
    the contender, all trained with the study's own seed; where the best is outermost the rates move on, but not beyond
    an end that a user has `given`. `looks` are the numbers of studies at which the results are
    looked at, declared beforehand; the last is the most that is run. `at_sizes` holds the same plan for other batch
    sizes, which have no part in the verdicts. `circumstances` are those of the whole comparison,
    `own` those of each contender: its results stay what they are when another one is added.
    """

    problem: str
    specs: tuple[str, ...]
    updates: tuple[int, ...]
    steps: tuple[int, ...]
    baseline: int
    looks: tuple[int, ...]
    trials: int
    budget: int
    lowest: float
    highest: float
    given: tuple[bool, bool]
    tune: bool
    device: str
    out: Path
    jobs: int
    plugins: tuple[str, ...]
    circumstances: dict[str, Any]
    own: tuple[dict[str, Any], ...]
    on: str = LOCAL
    retries: int = RETRIES
    sensitivity: tuple[str, ...] = (LR,)
    at_sizes: tuple[tuple[int, "Plan"], ...] = ()

    @property
    def studies(self) -> int:
        """The most studies that are run for a contender."""
        return self.looks[-1]

    @property
    def level(self) -> float:
        """What a p is held against at every look, so that all looks together give 5% of false verdicts."""
        return pocock(self.looks)

    @property
    def moves(self) -> int:
        """How many rates beyond its range a study may take: as many as within, where there is an inside at all."""
        return self.trials if self.tune and self.trials >= LEAST_TO_MOVE and not all(self.given) else 0

    @property
    def reach(self) -> tuple[float, float]:
        """The lowest and the highest rate that a study may take."""
        further = (self.highest / self.lowest) ** (self.moves / self.trials)
        low, high = self.given
        return self.lowest if low else self.lowest / further, self.highest if high else self.highest * further

    def settings(self, position: int, number: int) -> dict[str, dict[str, Any]]:
        """Return the settings of a study of a contender with spaces, specs with values and these by path, or none."""
        spec = self.specs[position]
        return settings(spec, f"{self.problem} {spec} {number}", self.trials) if searches(spec) else {}

    def study(self, position: int, number: int) -> dict[Any, Trial]:
        """Return the trials of a study by their rates; a rate of None leaves the spec's own.

        Those of a contender with spaces are by their whole spec.
        """
        if not self.tune:
            return {None: self.trial(position, None, number)}
        if found := self.settings(position, number):
            return {spec: self._trial(position, spec, number) for spec in found}
        rates = [self.rate(position, number, place) for place in range(self.trials)]
        return {rate: self.trial(position, rate, number) for rate in rates}

    def rate(self, position: int, number: int, place: int) -> float:
        """Return a rate of a study: evenly spaced, those at places 0 to `trials` - 1 are within the range."""
        ((start,),) = placed(f"{self.problem} {self.specs[position]} {number}", 1)
        span = math.log(self.highest / self.lowest)
        # three digits: nobody tunes finer, and the rates stay readable in names and legends
        digits = 3 if span > 0.02 * self.trials else 8
        return float(f"{self.lowest * math.exp(span * (place + start) / self.trials):.{digits}g}")

    def trial(self, position: int, rate: float | None, seed: int) -> Trial:
        """Return one run of a contender; a rate of None leaves the spec's own."""
        spec = self.specs[position]
        return self._trial(position, spec if rate is None else with_rate(spec, rate, self.updates[position]), seed)

    def _trial(self, position: int, spec: str, seed: int) -> Trial:
        updates, steps, own = self.updates[position], self.steps[position], digest(self.own[position])
        return Trial(self.problem, spec, seed, self.budget, updates, steps, self.device, own)

    def promise(self) -> str:
        """Return what this budget can show, before any of it is spent."""
        others, total = len(self.specs) - 1, len(self.specs) * self.studies * self.trials
        most = "at most " if len(self.looks) > 1 else ""
        said = (
            f"{len(self.specs)} contenders, {most}{self.studies} studies of {self.trials} "
            f"trial{'' if self.trials == 1 else 's'}: {most}{total} runs of {self.budget} gradient evaluations"
            f"{', more where the best rate is outermost' if self.moves else ''}. "
        )
        if self.at_sizes:
            said += self._promise_of_sizes(most)
        least = detectable(self.studies, others, self.level)
        if least is None:
            return f"{said}A verdict takes {fewest_studies(others, self.level)} studies: no difference can be shown."
        half = studies_for(0.5, others, self.level)
        return (
            f"{said}{self.studies} studies show a difference of {least:.1f} standard deviations (of the studies' "
            "paired differences) with a chance of 80%; one of 0.5 takes "
            f"{half if half < MOST_STUDIES else f'over {half}'}."
        )

    def _promise_of_sizes(self, most: str) -> str:
        """Return what other batch sizes cost, in runs and gradient evaluations."""
        sizes = " and ".join(str(size) for size, _ in self.at_sizes)
        runs = len(self.specs) * self.studies * self.trials
        evaluations = runs * sum(plan.budget for _, plan in self.at_sizes)
        return (
            f"Then batch sizes {sizes}, over as many samples{', tuned anew' if self.tune else ''}: {most}"
            f"{runs * len(self.at_sizes)} runs more, {evaluations} gradient evaluations"
            f"{', and more where the best rate is outermost' if self.moves else ''}. "
        )


def plan_comparison(
    *,
    problem: str,
    specs: Sequence[str],
    baseline: str | None = None,
    studies: int | str = STUDIES,
    trials: int = TRIALS,
    steps: int | None = None,
    tune: bool = True,
    device: str = "cpu",
    out: Path,
    jobs: int = 1,
    lr_min: float | None = None,
    lr_max: float | None = None,
    plugins: Sequence[str] = (),
    on: str = LOCAL,
    retries: int = RETRIES,
    sensitivity: str | Sequence[str] = (LR,),
) -> Plan:
    """Check what a user asked for; every contender makes one update, thrown away. Raises MetaoptError."""
    for value, what, least in ((trials, "--trials", 1), (jobs, "--jobs", 1), (retries, "--retries", 0)):
        if value < least:
            raise ProblemError(f"{what} must be {least} or more, got {value}")
    if steps is not None and steps < 1:
        raise ProblemError(f"--steps must be 1 or more gradient evaluations, got {steps}")
    lowest, highest = LOWEST if lr_min is None else lr_min, HIGHEST if lr_max is None else lr_max
    if tune:
        _check_range(lowest, highest, trials)
    found = problem_named(problem)
    pipelines = [parse(spec) for spec in (specs or DEFAULT_SPECS)]
    chosen = tuple(str(pipeline) for pipeline in pipelines)
    if len(chosen) < 2:
        raise SpecError("a comparison needs two contenders or more: give -o SPEC twice")
    twice = next((spec for position, spec in enumerate(chosen) if spec in chosen[:position]), None)
    if twice is not None:
        raise SpecError(f"two contenders are the same, {twice}: give each -o SPEC once")
    looks = _looks(studies, len(chosen) - 1)
    first = _position(baseline, chosen)
    device, budget = usable_device(device), steps or found.default_steps
    # of a schedule the curve over the whole budget: how many updates that is, is found with it
    costs = [_cost(found, spec, lowest if tune else None, device, budget) for spec in chosen]
    plan = Plan(
        problem=problem,
        specs=chosen,
        updates=tuple(budget // evaluations for _, evaluations in costs),
        steps=tuple(steps for steps, _ in costs),
        baseline=first,
        looks=looks,
        trials=trials if tune else 1,
        budget=budget,
        lowest=lowest,
        highest=highest,
        given=(lr_min is not None, lr_max is not None),
        tune=tune,
        device=device,
        out=out,
        jobs=jobs,
        plugins=tuple(plugins),
        circumstances=circumstances(problem, pipelines, device, plugins),
        own=tuple(circumstances(problem, [pipeline], device, plugins) for pipeline in pipelines),
        on=on,
        retries=retries,
        sensitivity=sensitivities(sensitivity),
    )
    return replace(plan, at_sizes=_at_sizes(plan, found)) if BATCH_SIZE in plan.sensitivity else plan


def _at_sizes(plan: Plan, problem: Problem) -> tuple[tuple[int, Plan], ...]:
    """Return the same plan for other batch sizes, over as many samples."""
    made, rate = [], plan.lowest if plan.tune else None
    for size, (text, other, budget) in resized(plan.problem, problem, plan.budget).items():
        costs = [_cost(other, spec, rate, plan.device, budget) for spec in plan.specs]
        data = {"data": other.data_hash()}  # the rest of the circumstances is the same
        changed = replace(
            plan,
            problem=text,
            budget=budget,
            updates=tuple(budget // evaluations for _, evaluations in costs),
            steps=tuple(steps for steps, _ in costs),
            circumstances=plan.circumstances | data,
            own=tuple(own | data for own in plan.own),
        )
        made.append((size, changed))
    return tuple(made)


def _cost(problem: Problem, spec: str, rate: float | None, device: str, budget: int) -> tuple[int, int]:
    """Return how many steps and gradients an update of a contender takes."""
    if not searches(spec):
        return cost_of_an_update(problem, spec if rate is None else with_rate(spec, rate, budget), device, budget)
    if rate is None:
        raise SpecError(f"{spec} has values that are still to be chosen: write them, or leave --no-tune out")
    return cost_of_settings(problem, spec, device, budget)


def _looks(studies: int | str, others: int) -> tuple[int, ...]:
    if str(studies) == "auto":
        return auto_looks(others)
    try:
        number = int(studies)
    except ValueError:
        raise ProblemError(f"--studies must be a whole number or auto, got {studies!r}") from None
    if number < 2:
        raise ProblemError(f"--studies must be 2 or more, got {number}")
    return (number,)


def _check_range(lowest: float, highest: float, trials: int) -> None:
    if not 0.0 < lowest <= highest < math.inf:
        raise ProblemError(f"--lr-min must be > 0 and at most --lr-max, got {lowest:g} and {highest:g}")
    if lowest == highest and trials > 1:
        raise ProblemError(f"--trials must be 1 where --lr-min equals --lr-max, {lowest:g}, got {trials}")


def _position(baseline: str | None, specs: Sequence[str]) -> int:
    if baseline is None:
        return 0
    wanted = str(parse(baseline))
    if wanted not in specs:
        raise SpecError(
            f"the baseline must be one of the contenders, got {wanted}: give it with -o as well, word for word"
        )
    return list(specs).index(wanted)


def expanded(spec: str) -> str:
    """Return the spec with every hyperparameter that it leaves to a default: defaults change between versions."""
    return " | ".join(_expanded(part) for part in Pipeline(parse(spec).parts))


def _expanded(part: Part) -> str:
    values = {name: h.default for name, h in part.hyperparameters.items() if not h.required} | dict(part.arguments)
    label = {} if part.label is None else {"label": part.label}
    return f"{part.name}({', '.join(f'{name}={value!r}' for name, value in (values | label).items())})"
