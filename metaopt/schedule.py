"""Schedule: a pure function from the number of updates to the value of one hyperparameter."""

import functools
import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from metaopt.deferred import Deferred
from metaopt.errors import HyperparameterError
from metaopt.hyperparameters import Hyperparameter, plain
from metaopt.space import validate_ends

Curve = Callable[[float], float]

# no run has more updates, and no float counts further one by one
LONGEST = 2**53
# points at which a scheduled value is held against the bounds of its hyperparameter
SAMPLES = 1000


class Schedule(Deferred):
    """A closed form: value from update count, nothing stored. Subclasses declare hyperparameters with `hyper`.

    A schedule is configuration: `curve` fixes it for a run. After its end it holds its last value.
    """

    def _validated(self, hyperparameter: Hyperparameter, value: Any) -> Any:
        where = self._called()
        return validate_ends(hyperparameter, value, where, lambda h, plain: h.validate(plain, where=where))

    @abstractmethod
    def curve(self, run: int | None, span: int | None) -> Curve:
        """Return the closed form t -> value for a run of `run` updates, `span` of which are left to this schedule.

        Raises HyperparameterError where a length depends on the run's and that is unknown.
        """

    def length(self, run: int | None, span: int | None) -> int | None:
        """Return after how many updates the last value is reached, or None where there is no end."""
        steps = getattr(self, "steps", None)
        if steps is None and "steps" not in self.hyperparameters:
            return None
        return self.resolve_steps(steps, run, span)

    def resolve_steps(
        self, steps: int | float | None, run: int | None, span: int | None, *, least: Literal[0, 1] = 1
    ) -> int:
        """Return a length in updates: None is what is left of the run, a float in (0, 1) a fraction of the whole.

        `least=0` allows a part of no length, such as a warm-up that is switched off.
        """
        where = self._called()
        if steps is None:
            if span is None:
                raise HyperparameterError(f"{where}: steps=None means to the end of the run: give total_steps as well")
            return max(1, span)
        if isinstance(steps, float) and 0.0 < steps < 1.0:
            if run is None:
                raise HyperparameterError(f"{where}: steps={steps} is a fraction of the run: give total_steps as well")
            return max(1, round(steps * run))
        # 1.0 may mean one update or the whole run: nobody should have to guess
        whole = isinstance(steps, int) or (isinstance(steps, float) and steps.is_integer() and steps != 1.0)
        if not whole or isinstance(steps, bool) or not least <= steps <= LONGEST:
            raise HyperparameterError(
                f"{where}: steps must be an integer >= 1, a fraction of the run below 1, or None for all that is left "
                f"of it, got {steps!r:.60}"
            )
        return int(steps)

    def curve_of(self, member: Any, run: int | None, span: int | None) -> Curve:
        """Return the curve of a part of this schedule: a schedule, a number, or a Python function of the updates."""
        member = as_schedule(plain(member))
        if isinstance(member, Schedule) and not isinstance(member, TupleSchedule):
            return member.curve(run, span)
        if isinstance(member, int | float) and not isinstance(member, bool):
            number = float(member)
            return lambda t: number
        raise HyperparameterError(f"{self._called()}: {member!r:.60} must be a schedule or a number")

    def __call__(self, t: float, total_steps: int | None = None) -> float:
        """Return the value after `t` updates."""
        return self.curve(total_steps, total_steps)(t)


class TupleSchedule(Schedule):
    """v(t) = (s_1(t), s_2(t), ...): a tuple, such as betas, of which some members follow schedules."""

    def __init__(self, members: Sequence[Any]) -> None:
        self.members = tuple(members)
        self.given = {"members": self.members}

    def curve(self, run: int | None, span: int | None) -> Callable[[float], Any]:
        curves = [member.curve(run, span) if isinstance(member, Schedule) else member for member in self.members]
        return lambda t: tuple(curve(t) if callable(curve) else curve for curve in curves)

    def length(self, run: int | None, span: int | None) -> int | None:
        lengths = [member.length(run, span) for member in self.members if isinstance(member, Schedule)]
        return None if None in lengths else max(length for length in lengths if length is not None)

    def __repr__(self) -> str:
        return f"({', '.join(map(repr, self.members))})"


class FunctionSchedule(Schedule):
    """v(t) = function(t), with any Python function of the number of updates. It has no text."""

    def __init__(self, function: Callable[[int], float]) -> None:
        self.function = function
        self.given = {"function": function}

    def curve(self, run: int | None, span: int | None) -> Curve:
        return lambda t: _number(self.function, t)

    def __repr__(self) -> str:
        return f"the function {getattr(self.function, '__qualname__', repr(self.function))}"


def _number(function: Callable[[Any], Any], t: float) -> float:
    value = plain(function(t))
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise HyperparameterError(
            f"the schedule {function!r:.60} must return a number, got {value!r:.60} after {t} updates"
        )
    return float(value)


def as_schedule(value: Any) -> Any:
    """Return a schedule for a Python function, and for a tuple with schedules among its members; others unchanged."""
    if inspect.isroutine(value) or isinstance(value, functools.partial):
        return FunctionSchedule(value)
    if isinstance(value, tuple | list):
        members = [as_schedule(member) for member in value]
        if any(isinstance(member, Schedule) for member in members):
            return TupleSchedule(members)
    return value


def validate_value(hyperparameter: Hyperparameter, value: Any, where: str) -> Any:
    """Return `value` if the hyperparameter allows it: a plain one, a schedule for a float or in a tuple, or a space."""
    return validate_ends(hyperparameter, value, where, lambda h, own: _validate_plain_or_schedule(h, own, where))


def _validate_plain_or_schedule(hyperparameter: Hyperparameter, value: Any, where: str) -> Any:
    found = as_schedule(value) if hyperparameter.schedulable or hyperparameter.takes_tuple else value
    if not isinstance(found, Schedule):
        return hyperparameter.validate(value, where=where)
    if isinstance(found, TupleSchedule) and hyperparameter.takes_tuple:
        # what schedules give is checked when a stack is made: their lengths may depend on the run's
        numbers = tuple(m for m in found.members if not isinstance(m, Schedule))
        if not all(isinstance(number, int | float | torch.Tensor) for number in numbers):
            raise HyperparameterError(f"{where}: {hyperparameter.name} must hold numbers or schedules, got {found!r}")
        hyperparameter.validate(numbers, where=where)
        return found
    if hyperparameter.takes_tuple:
        raise HyperparameterError(
            f"{where}: {hyperparameter.name} takes no schedule as a whole: give a tuple with a schedule in it, such as "
            f"({found!r}, 0.999)"
        )
    if isinstance(found, TupleSchedule) or not hyperparameter.schedulable:
        raise HyperparameterError(
            f"{where}: {hyperparameter.name} takes no schedule: only a hyperparameter that is a float or a tuple of "
            f"floats does; give it a plain value"
        )
    return found


def validate_values(schedule: Schedule, hyperparameter: Hyperparameter, where: str, total_steps: int | None) -> None:
    """Hold what a schedule gives against declared bounds; a value on an open bound passes: warm-ups begin there."""
    if not hyperparameter.bounds():
        return
    curve: Callable[[float], Any] = schedule.curve(total_steps, total_steps)
    end = total_steps or schedule.length(total_steps, total_steps) or 10 * SAMPLES
    for t in sorted({round(end * i / SAMPLES) for i in range(SAMPLES + 1)}):
        value = curve(t)
        if not all(map(hyperparameter.within_closed_bounds, value if isinstance(value, tuple) else (value,))):
            raise HyperparameterError(
                f"{where}: the schedule {schedule!r} gives {hyperparameter.name}={value!r:.12} after {t} updates, but "
                f"{hyperparameter.name} must be {hyperparameter.bounds()}"
            )
