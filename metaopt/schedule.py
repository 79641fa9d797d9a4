"""Schedule: a pure function from the number of updates to the value of one hyperparameter; how it drives a group."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from metaopt.errors import HyperparameterError, ScheduleConflict
from metaopt.hyperparameters import Hyperparameter, bind, declared

Curve = Callable[[float], float]

# no run has more updates, and no float counts further one by one
LONGEST = 2**53


class Schedule(ABC):
    """A closed form: value from update count, nothing stored. Subclasses declare hyperparameters with `hyper`.

    A schedule is configuration: `curve` fixes it for a run. After its end it holds its last value.
    """

    hyperparameters: ClassVar[dict[str, Hyperparameter]] = {}
    known_as: ClassVar[tuple[str, ...]] = ()
    given: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.hyperparameters = declared(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        where = self._called()
        given = bind(self.hyperparameters, where, args, kwargs)
        values = {}
        for name, hyperparameter in self.hyperparameters.items():
            if name not in given and hyperparameter.required:
                raise HyperparameterError(f"{where} needs {name}: {hyperparameter.doc or 'it has no default'}")
            values[name] = hyperparameter.validate(given.get(name, hyperparameter.default), where=where)
        self.__dict__.update(values)
        self.given = {name: values[name] for name in given}

    def _called(self) -> str:
        """Return the name for errors: CosineRestarts -> cosine_restarts."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()

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

    def resolve_steps(self, steps: int | float | None, run: int | None, span: int | None) -> int:
        """Return a length in updates: None is what is left of the run, a float in (0, 1) a fraction of the whole."""
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
        if not whole or isinstance(steps, bool) or not 1 <= steps <= LONGEST:
            raise HyperparameterError(
                f"{where}: steps={steps!r:.60} is no number of updates: give an integer, a fraction below 1 of the "
                f"run, or None for all that is left of it"
            )
        return int(steps)

    def __call__(self, t: float, total_steps: int | None = None) -> float:
        """Return the value after `t` updates."""
        return self.curve(total_steps, total_steps)(t)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.given == getattr(other, "given", None)

    def __hash__(self) -> int:
        return hash((type(self), repr(self.given)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.given.items())})"


class ScheduledValues:
    """The schedules of one group: values are written after each update for the next one, and guarded until then."""

    def __init__(self, schedules: Mapping[str, Schedule], total_steps: int | None) -> None:
        self.schedules = dict(schedules)
        self._curves: dict[str, Curve] = {
            key: schedule.curve(total_steps, total_steps) for key, schedule in schedules.items()
        }
        self._written: dict[str, tuple[Any, int]] = {}
        self._count = 0  # of the updates made when the values were written

    def value(self, key: str, t: int, group: dict[str, Any]) -> float:
        """Return the value of one hyperparameter after `t` updates, the group's `lr_scale` included."""
        value = self._curves[key](t)
        return value * group.get("metaopt.lr_scale", 1.0) if key == "lr" else value

    def write(self, group: dict[str, Any]) -> None:
        """Set every scheduled value for the update that comes next."""
        t = self._count = group["metaopt.updates"]
        for key in self._curves:
            # `+ 0.0` makes a new object: a 0.0 that user code puts there differs from a warm-up's 0.0
            value = self.value(key, t, group) + 0.0
            current = group.get(key)
            if isinstance(current, torch.Tensor):
                current.fill_(value)
                self._written[key] = (current, current._version)
            else:
                group[key] = value
                self._written[key] = (value, 0)

    def are_unchanged(self, group: dict[str, Any]) -> bool:
        """Return whether every scheduled value is the very object that was written."""
        return all(group[key] is self._written[key][0] for key in self._curves)

    def raise_if_changed(self, group: dict[str, Any]) -> None:
        """Raise ScheduleConflict if a scheduled value is not the one that was written; reads no tensor.

        If the count has moved, a client has put a checkpoint's entries into the group: values follow the count.
        """
        if group["metaopt.updates"] != self._count:
            self.write(group)
            return
        for key, (value, version) in self._written.items():
            current = group[key]
            if isinstance(current, torch.Tensor):
                changed = current is not value or current._version != version
            else:
                changed = current is not value and current != value
            if changed:
                raise ScheduleConflict(self._conflict(key, current, value))

    def _conflict(self, key: str, current: Any, value: Any) -> str:
        found = "a tensor that was changed" if isinstance(current, torch.Tensor) else repr(current)
        written = "its own" if isinstance(value, torch.Tensor) else repr(value)
        return (
            f"{key} is driven by the schedule {self.schedules[key]!r}, which wrote {written}, but holds {found}: "
            f"something else sets it too, most likely a torch scheduler (a Trainer makes one by default). "
            f"Either drop one of the two, or hand the other party opt.scheduler(), which only reports"
        )
