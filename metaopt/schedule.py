"""Schedule: a pure function from the number of updates done to the value of one hyperparameter."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from metaopt.errors import HyperparameterError
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
