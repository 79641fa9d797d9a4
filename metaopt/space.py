"""Space: the values from which a search chooses one for a hyperparameter."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from metaopt.deferred import Deferred
from metaopt.errors import HyperparameterError
from metaopt.hyperparameters import Hyperparameter


class Space(Deferred):
    """The values that a search may give a hyperparameter, as a function of a number from 0 to 1.

    Subclasses declare hyperparameters with `hyper` and define `value`. Equal lengths of [0, 1] are equally likely.
    """

    # whether neighbours in `options` are alike, as numbers are
    ordered: ClassVar[bool] = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.validate()
        last = max((position for position, name in enumerate(self.hyperparameters) if name in self.given), default=-1)
        # a space is written as people write it, log(1e-4, 1e-1)
        self.positional = tuple(getattr(self, name) for name in list(self.hyperparameters)[: last + 1])

    def validate(self) -> None:
        """Raise HyperparameterError if hyperparameters contradict each other; the default accepts all."""

    @abstractmethod
    def value(self, u: float) -> Any:
        """Return the value at `u`, from 0 to 1, both included. Equal numbers give equal values."""

    def options(self) -> Sequence[Any] | None:
        """Return all values if the space has a finite number of them, otherwise None as by default."""
        return None

    def ends(self) -> Sequence[Any]:
        """Return the values that are held against the bounds of the hyperparameter: the options, or both ends."""
        options = self.options()
        if options is None:
            return self.value(0.0), self.value(1.0)
        return (options[0], options[-1]) if self.ordered else options

    def __repr__(self) -> str:
        return f"{self._called()}({', '.join(map(repr, self.positional or ()))})"


def find_spaces(value: Any, path: str) -> Iterator[tuple[str, Space]]:
    """Yield the spaces in a value, in a tuple or a schedule too, each with the path that leads to it."""
    if isinstance(value, Space):
        yield path, value
    elif isinstance(value, tuple | list):
        for position, member in enumerate(value):
            yield from find_spaces(member, f"{path}[{position}]")
    elif isinstance(value, Deferred):
        if value.positional is not None:
            yield from find_spaces(value.positional, path)
        for name, member in value.given.items():
            yield from find_spaces(member, f"{path}.{name}")


def fill_spaces(value: Any, path: str, chosen: Mapping[str, Any]) -> Any:
    """Return the value with what was chosen for each path in the place of its spaces."""
    if isinstance(value, Space):
        return chosen[path]
    if isinstance(value, tuple | list):
        return type(value)([fill_spaces(member, f"{path}[{i}]", chosen) for i, member in enumerate(value)])
    if isinstance(value, Deferred) and any(find_spaces(value, path)):
        positional = fill_spaces(value.positional or (), path, chosen)
        return type(value)(*positional, **{n: fill_spaces(v, f"{path}.{n}", chosen) for n, v in value.given.items()})
    return value


Validate = Callable[[Hyperparameter, Any], Any]


def validate_ends(hyperparameter: Hyperparameter, value: Any, where: str, validate: Validate) -> Any:
    """Return a space, or a tuple with spaces among its members, if the hyperparameter allows all their ends.

    `validate` returns a plain value or raises; any other value is left to it. Raises HyperparameterError.
    """
    if isinstance(value, Space):
        for end in value.ends():
            if any(find_spaces(end, "")):
                raise HyperparameterError(f"{where}: {value!r:.80} must not hold another space")
            _validate_end(hyperparameter, end, value, where, validate)
        return value
    if not isinstance(value, tuple | list) or not any(isinstance(member, Space) for member in value):
        return validate(hyperparameter, value)
    if not hyperparameter.takes_tuple and hyperparameter.type is not None:
        raise HyperparameterError(f"{where}: {hyperparameter.name} must not be a tuple of spaces, got {value!r:.80}")
    first = [member.ends()[0] if isinstance(member, Space) else member for member in value]
    for position, member in enumerate(value):
        for end in member.ends() if isinstance(member, Space) else ():
            tried = type(value)([*first[:position], end, *first[position + 1 :]])
            _validate_end(hyperparameter, tried, member, where, validate)
    return tuple(value)


def _validate_end(hyperparameter: Hyperparameter, end: Any, space: Space, where: str, validate: Validate) -> None:
    try:
        validate(hyperparameter, end)
    except HyperparameterError as error:
        name = f"{where}: {hyperparameter.name}"
        told = str(error).removeprefix(f"{where}: ")
        instead = _instead(hyperparameter, space)
        raise HyperparameterError(f"{name} cannot be searched in {space!r:.80}: {told}{instead}") from None


def _instead(hyperparameter: Hyperparameter, space: Space) -> str:
    wants_whole = int in hyperparameter.alternatives() and float not in hyperparameter.alternatives()
    return "; integers(low, high) gives whole numbers" if wants_whole and space.options() is None else ""
