"""The learning rate of a spec as one number: the largest of its schedule, and of several bases the first one's."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace as changed
from typing import Any

import numpy as np

from metaopt.errors import HyperparameterError, SpecError
from metaopt.registry import registry
from metaopt.schedule import Schedule, TupleSchedule
from metaopt.specs.parsing import parse
from metaopt.specs.pipeline import Part, Pipeline
from metaopt.specs.text import to_text

# hyperparameters of schedules that are values of the curve; what does not scale with them is found by looking
VALUES = ("value", "start", "end", "low", "high", "peak", "factor")
POINTS = 1000
# six digits of a rate are kept: it stays readable in names and legends
TOLERANCE = 1e-5


def with_rate(spec: str, rate: float, updates: int) -> str:
    """Return the spec with another learning rate, over a run of so many updates.

    A schedule is scaled as one, so that its largest value is the rate. Several bases, of a partition or a switch, are
    scaled by one factor, so that the first of them has the rate. Raises SpecError where there is no rate to scale.
    """
    pipeline = parse(spec)
    bases = list(_bases(pipeline))
    reference = _largest(bases[0], spec, updates)
    return str(_scaled(pipeline, rate / reference, rate if len(bases) == 1 else None, spec, updates))


def rate_of(spec: str, updates: int) -> float:
    """Return the learning rate that a spec trains with if it is left alone. Raises SpecError where it has none."""
    return _largest(next(_bases(parse(spec))), spec, updates)


def given_rate(spec: str) -> str | None:
    """Return the learning rate that a spec gives itself, as text, or None."""
    given = next((part.arguments.get("lr") for part in _bases(parse(spec))), None)
    return None if given is None else to_text(given, "lr")


def _bases(pipeline: Pipeline) -> Iterator[Part]:
    """Yield the optimizers that update parameters, in the order in which they are written."""
    for part in pipeline:
        if part.is_partition:
            parts: Mapping[str, Pipeline] = part.arguments.get("parts", {})
            for inner in parts.values():
                yield from _bases(inner)
        elif part.is_sequence:
            for member in part.arguments.get("members", ()):
                if isinstance(member, Pipeline):
                    yield from _bases(member)
        elif part.kind == "optimizer":
            yield part


def _scaled(pipeline: Pipeline, factor: float, rate: float | None, spec: str, updates: int) -> Pipeline:
    return changed(pipeline, parts=tuple(_scaled_part(part, factor, rate, spec, updates) for part in pipeline))


def _scaled_part(part: Part, factor: float, rate: float | None, spec: str, updates: int) -> Part:
    made: Part
    if part.is_partition:
        parts = part.arguments.get("parts", {})
        made = part(parts={name: _scaled(inner, factor, rate, spec, updates) for name, inner in parts.items()})
    elif part.is_sequence:
        members = part.arguments.get("members", ())
        made = part(*(_scaled(m, factor, rate, spec, updates) if isinstance(m, Pipeline) else m for m in members))
    elif part.kind != "optimizer":
        return part
    else:
        value = _value(part, spec)
        if isinstance(value, Schedule):
            made = part(lr=scaled_schedule(value, factor, updates))
        else:
            made = part(lr=_short(value * factor) if rate is None else rate)
    return made


def _value(part: Part, spec: str) -> Any:
    """Return the rate of a base: a number or a schedule."""
    known = part.hyperparameters.get("lr")
    if known is None:
        raise SpecError(f"{spec}: {part.name} has no lr, so no rate can be tuned: give --no-tune")
    value = part.arguments.get("lr", 1.0 if known.required else known.default)
    if isinstance(value, TupleSchedule) or not isinstance(value, Schedule | int | float) or isinstance(value, bool):
        raise SpecError(f"{spec}: lr of {part.name} must be a number or a schedule to be tuned, got {value!r:.60}")
    return value


def _largest(part: Part, spec: str, updates: int) -> float:
    value = _value(part, spec)
    largest = float(np.max(np.abs(_curve(value, updates)))) if isinstance(value, Schedule) else abs(float(value))
    if not 0.0 < largest < math.inf:
        raise SpecError(f"{spec}: the rate of {part.name} must be > 0 and finite to be scaled, got {largest:g}")
    return largest


def _curve(schedule: Schedule, updates: int) -> Any:
    curve = schedule.curve(updates, updates)
    times = range(updates) if updates <= POINTS else np.unique(np.linspace(0, updates - 1, POINTS).round())
    return np.array([curve(int(t)) for t in times], dtype=float)


def scaled_schedule(schedule: Schedule, factor: float, updates: int) -> Schedule:
    """Return the schedule times a factor: with its own values multiplied where that gives it, else `scale(...)`."""
    wanted = factor * _curve(schedule, updates)
    try:
        found = _multiplied(schedule, factor)
        if np.allclose(_curve(found, updates), wanted, rtol=TOLERANCE, atol=TOLERANCE * np.max(np.abs(wanted))):
            return found
    except HyperparameterError:
        pass  # a value left its bounds
    scale: Schedule = registry.find("scale", "schedule").target(schedule, _short(factor))
    return scale


def _multiplied(schedule: Schedule, factor: float) -> Schedule:
    positional = getattr(schedule, "positional", None)
    if positional is not None:  # a sequence: values and lengths in turn
        return type(schedule)(*(_times(v, factor) if i % 2 == 0 else v for i, v in enumerate(positional)))
    # a default that is a value of the curve scales too
    values = {name: getattr(schedule, name, None) for name in schedule.hyperparameters if name in VALUES}
    values = {name: value for name, value in values.items() if name in schedule.given or value}
    scaled = {name: _times(value, factor) for name, value in values.items()}
    inner = {
        name: _times(v, factor) for name, v in schedule.given.items() if isinstance(v, Schedule) or name == "schedule"
    }
    return type(schedule)(**{**schedule.given, **scaled, **inner})


def _times(value: Any, factor: float) -> Any:
    if isinstance(value, Schedule):
        return _multiplied(value, factor)
    return _short(value * factor) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _short(value: float) -> float:
    return float(f"{value:.6g}")
