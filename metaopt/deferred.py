"""What is written in the place of a value and becomes one later: a schedule in the run, a space in a search."""

import re
from abc import ABC
from typing import Any, ClassVar

from metaopt.errors import HyperparameterError
from metaopt.hyperparameters import Hyperparameter, bind, declared


class Deferred(ABC):
    """Configuration without state, made from hyperparameters that a subclass declares with `hyper`.

    `given` holds those that the caller gave. A class that takes values in order, without names, keeps them in
    `positional` instead.
    """

    hyperparameters: ClassVar[dict[str, Hyperparameter]] = {}
    known_as: ClassVar[tuple[str, ...]] = ()
    given: dict[str, Any]
    positional: tuple[Any, ...] | None = None

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
            values[name] = self._validated(hyperparameter, given.get(name, hyperparameter.default))
        self.__dict__.update(values)
        self.given = {name: values[name] for name in given}

    def _validated(self, hyperparameter: Hyperparameter, value: Any) -> Any:
        return hyperparameter.validate(value, where=self._called())

    def _called(self) -> str:
        """Return the name for errors: CosineRestarts -> cosine_restarts."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other) or not isinstance(other, Deferred):
            return False
        return self.given == other.given and self.positional == other.positional

    def __hash__(self) -> int:
        return hash((type(self), repr(self.given), repr(self.positional)))

    def __repr__(self) -> str:
        if self.positional is not None:
            return f"{type(self).__name__}({', '.join(map(repr, self.positional))})"
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.given.items())})"
