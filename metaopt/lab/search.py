"""Settings drawn from the spaces of a spec: evenly, and the same for the same seed."""

from dataclasses import replace as changed
from typing import Any

from metaopt.errors import MissingExtra, SpecError
from metaopt.registry import registry
from metaopt.schedule import Schedule
from metaopt.space import Space
from metaopt.specs.pipeline import Part, Pipeline
from metaopt.specs.spaces import spaces_of, with_values
from metaopt.tuner import Point

# of a spec without a space the learning rate is searched
RATES = (1e-4, 1.0)


def points(dimensions: int, count: int, seed: int) -> list[Point]:
    """Return the first points of a scrambled Sobol sequence in the unit cube; more points begin with the same ones."""
    try:
        from scipy.stats import qmc
    except ImportError:
        raise MissingExtra("a search", "scipy", "lab") from None
    sequence = qmc.Sobol(dimensions, scramble=True, rng=seed)
    drawn = sequence.random_base2(max(0, count - 1).bit_length())
    return [tuple(float(u) for u in point) for point in drawn[:count]]


def draw(pipeline: Pipeline, count: int, seed: int) -> list[Pipeline]:
    """Return pipelines with values in the place of all spaces, evenly over the spaces. Raises SpecError without any."""
    spaces = spaces_of(pipeline)
    if not spaces:
        raise SpecError(f"{pipeline} has nothing to choose: write a space, such as lr=log(1e-4, 1e-1)")
    drawn = []
    for point in points(len(spaces), count, seed):
        values = {path: space.value(u) for (path, space), u in zip(spaces.items(), point, strict=True)}
        drawn.append(with_values(pipeline, values))
    return drawn


def with_rate_space(pipeline: Pipeline, low: float = RATES[0], high: float = RATES[1]) -> Pipeline:
    """Return the pipeline with a space for the learning rate of each base, if it has no space at all.

    Raises SpecError for a base without a rate, and for a rate that a schedule drives: where the space stands is then
    the user's to say.
    """
    if spaces_of(pipeline):
        return pipeline
    rate = registry.find("log", "space").target(low, high)
    return Pipeline(tuple(_with_rate(part, rate) for part in pipeline))


def _with_rate(part: Part, rate: Space) -> Part:
    if part.kind != "optimizer":
        return part
    if part.is_partition:
        parts = {key: Pipeline(tuple(_with_rate(p, rate) for p in own)) for key, own in part.arguments["parts"].items()}
        return changed(part, arguments={"parts": parts})
    if part.is_sequence or "lr" not in part.hyperparameters or isinstance(part.arguments.get("lr"), Schedule):
        raise SpecError(
            f"{part}: nothing says what is searched: write a space into it, such as lr=log(1e-4, 1e-1) or "
            f"lr=warmup(cosine(log(1e-4, 1e-1)), 0.05)"
        )
    made: Any = part(lr=rate)
    return made  # type: ignore[no-any-return]
