"""Schedules made of schedules: a warm-up before one, several in sequence, one times a factor."""

from collections.abc import Callable
from typing import Any

from metaopt import Example, HyperparameterError, Schedule, hookimpl, hyper


class Warmup(Schedule):
    """v(t) = start + (s(0) - start) t / w for t < w, then s(t - w). arXiv:1706.02677"""

    known_as = ("LinearWarmup", "warmup_constant_schedule", "get_constant_schedule_with_warmup")
    schedule: Any = hyper(doc="the schedule after the warm-up, or a number that then stays")
    steps: int | float = hyper(doc="updates, or a fraction of the run", known_as=("warmup_steps", "num_warmup_steps"))
    start: float = hyper(0.0, doc="the value at the first update", known_as=("init_value",))

    def curve(self, run: int | None, span: int | None) -> Callable[[float], float]:
        steps = self.resolve_steps(self.steps, run, span, least=0)
        _check_reached("warmup", "its schedule", steps, span)
        then = self.curve_of(self.schedule, run, None if span is None else span - steps)
        first = then(0)

        def value(t: float) -> float:
            return self.start + (first - self.start) * t / steps if t < steps else then(t - steps)

        return value

    def length(self, run: int | None, span: int | None) -> int | None:
        steps = self.resolve_steps(self.steps, run, span, least=0)
        if not isinstance(self.schedule, Schedule):
            return steps
        after = self.schedule.length(run, None if span is None else span - steps)
        return None if after is None else steps + after


class Sequence(Schedule):
    """sequence(a, n, b, m, ..., z): a for n updates, b for m, ..., z to the end; each counts its own t from 0."""

    known_as = ("SequentialLR", "join_schedules")
    positional: tuple[Any, ...]

    def __init__(self, *members: Any) -> None:
        if len(members) < 3 or len(members) % 2 == 0:
            raise HyperparameterError(
                f"sequence takes schedule, updates, ..., schedule: an odd number of values, not {len(members)}"
            )
        self.given = {}
        self.positional = members

    def curve(self, run: int | None, span: int | None) -> Callable[[float], float]:
        curves: list[tuple[int, Callable[[float], float]]] = []
        begin = 0
        for member, steps in zip(self.positional[::2], (*self.positional[1::2], None), strict=True):
            left = None if span is None else span - begin
            _check_reached("sequence", f"its member {len(curves) + 1}", begin, span)
            length = None if steps is None else self.resolve_steps(steps, run, left, least=0)
            curves.append((begin, self.curve_of(member, run, left if length is None else length)))
            begin += length or 0

        def value(t: float) -> float:
            begin, curve = next(pair for pair in reversed(curves) if t >= pair[0])
            return curve(t - begin)

        return value

    def length(self, run: int | None, span: int | None) -> int | None:
        begin = 0
        for steps in self.positional[1::2]:
            begin += self.resolve_steps(steps, run, None if span is None else span - begin, least=0)
        last = self.positional[-1]
        # a number is reached when its turn comes
        after = last.length(run, None if span is None else span - begin) if isinstance(last, Schedule) else 0
        return None if after is None else begin + after


class Scale(Schedule):
    """v(t) = factor s(t): a schedule as a whole, made larger or smaller."""

    known_as = ("scale_schedule",)
    schedule: Any = hyper(doc="the schedule, or a number")
    factor: float = hyper(doc="multiplies every value")

    def curve(self, run: int | None, span: int | None) -> Callable[[float], float]:
        inner = self.curve_of(self.schedule, run, span)
        return lambda t: self.factor * inner(t)

    def length(self, run: int | None, span: int | None) -> int | None:
        return self.schedule.length(run, span) if isinstance(self.schedule, Schedule) else 0


def _check_reached(where: str, what: str, begin: int, span: int | None) -> None:
    """Refuse what the run ends before: it would be ignored. A curve that the run merely cuts short is a choice."""
    if span is not None and begin >= max(1, span):
        raise HyperparameterError(
            f"{where}: {what} begins after {begin} updates, and there are {span}: shorten what comes before it "
            f"(0.1 is a tenth of the run) or leave it out"
        )


@hookimpl
def metaopt_schedules() -> dict[str, type[Schedule]]:
    return {"warmup": Warmup, "sequence": Sequence, "scale": Scale}


@hookimpl
def metaopt_examples() -> dict[str, Example]:
    return {
        "sequence": Example("sequence(linear(0.0, 0.1), 10, 0.1, 0.5, cosine(0.1))"),
        "scale": Example("scale(cosine(0.1), 0.5)"),
    }
