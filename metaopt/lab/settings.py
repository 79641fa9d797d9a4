"""The settings of a contender that writes spaces into its spec: where its studies look, and what they found."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from metaopt.errors import ProblemError, SpecError
from metaopt.lab.placement import placed
from metaopt.lab.rates import rate_of
from metaopt.lab.trial import cost_of_an_update
from metaopt.problem_class import Problem
from metaopt.specs.parsing import parse
from metaopt.specs.spaces import spaces_of, with_values


def searches(spec: str) -> bool:
    """Return whether a spec says itself, with spaces, what is to be tuned."""
    return bool(spaces_of(parse(spec)))


def settings(spec: str, name: str, trials: int) -> dict[str, dict[str, Any]]:
    """Return specs with values in the place of all spaces, and these values by path: placed at random by `name`."""
    pipeline = parse(spec)
    spaces = spaces_of(pipeline)
    found = {}
    for point in placed(name, trials, len(spaces)):
        values = {path: space.value(u) for (path, space), u in zip(spaces.items(), point, strict=True)}
        found[str(with_values(pipeline, values))] = values
    return found


def rate_in(spec: str, updates: int) -> float | None:
    """Return the largest learning rate of a spec without spaces, or None where it has none."""
    try:
        return rate_of(spec, updates)
    except SpecError:
        return None


def cost_of_settings(problem: Problem, spec: str, device: str, budget: int) -> tuple[int, int]:
    """Return how many steps and gradients an update takes, at the ends of every space as in their middle.

    Raises ProblemError where settings differ in it: their runs would not be of one length.
    """
    pipeline = parse(spec)
    spaces = spaces_of(pipeline)
    middle = {path: space.value(0.5) for path, space in spaces.items()}
    tried = [middle, *({**middle, path: end} for path, space in spaces.items() for end in space.ends())]
    specs = dict.fromkeys(str(with_values(pipeline, values)) for values in tried)
    costs = {own: cost_of_an_update(problem, own, device, budget) for own in specs}
    if len(set(costs.values())) > 1:
        one, other = sorted(costs, key=lambda own: costs[own])[:: len(costs) - 1]
        raise ProblemError(
            f"{spec}: every setting of a contender must take as many gradients for an update, got {costs[one][1]} for "
            f"{one} and {costs[other][1]} for {other}: make them contenders of their own"
        )
    return next(iter(costs.values()))


def found_in(chosen: Sequence[Mapping[str, Any]]) -> str:
    """Return what studies found for each space: the median and the range of numbers, how often each option."""
    said = []
    for path in chosen[0]:
        values = [values[path] for values in chosen]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            numbers = [float(value) for value in values]
            said.append(f"{path} {median(numbers):.3g} ({min(numbers):.3g} to {max(numbers):.3g})")
        else:
            counted = Counter(map(str, values)).most_common()
            said.append(f"{path} {', '.join(f'{value} in {number}' for value, number in counted)}")
    return "; ".join(said)
