"""How a hyperparameter is declared once, and checked wherever it is given."""

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from metaopt.errors import HyperparameterError, did_you_mean


class Required:
    """The default of a hyperparameter that has none."""

    def __repr__(self) -> str:
        return "required"

    def __reduce__(self) -> str:
        return "REQUIRED"


REQUIRED = Required()


def plain(value: Any) -> Any:
    """Return a value of numpy, or in containers of a configuration library, as Python's own.

    A checkpoint and a text hold only these. Numbers of numpy may be among the members of a tuple.
    """
    if isinstance(value, tuple | list):
        return type(value)(map(plain, value)) if type(value) in (tuple, list) else value
    module = type(value).__module__.partition(".")[0]
    if module == "numpy" and hasattr(value, "tolist"):  # a scalar or an array; numpy need not be imported for this
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return list(map(plain, value))
    return value


@dataclass(frozen=True)
class Hyperparameter:
    """One declared hyperparameter: name, default, type, bounds and meaning.

    `schedulable` is true for plain floats: those are the ones whose value may change with time.
    """

    name: str
    default: Any = REQUIRED
    type: Any = None
    ge: float | None = None
    le: float | None = None
    gt: float | None = None
    lt: float | None = None
    choices: tuple[Any, ...] | None = None
    doc: str = ""
    known_as: tuple[str, ...] = ()
    per_group: bool = True
    defines_state: bool = False

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    @property
    def schedulable(self) -> bool:
        return float in _alternatives(self.type)

    @property
    def takes_tuple(self) -> bool:
        return tuple in (typing.get_origin(kind) or kind for kind in _alternatives(self.type))

    def alternatives(self) -> tuple[Any, ...]:
        """Return the types that are allowed: `int | None` -> (int, NoneType)."""
        return _alternatives(self.type)

    def bounds(self) -> str:
        """Return the bounds as text, such as `> 0, <= 1`, or an empty text."""
        if self.choices is not None:
            return "one of " + ", ".join(repr(choice) for choice in self.choices)
        limits = ((">=", self.ge), (">", self.gt), ("<=", self.le), ("<", self.lt))
        return ", ".join(f"{sign} {limit:g}" for sign, limit in limits if limit is not None)

    def validate(self, value: Any, *, where: str) -> Any:
        """Return `value` if it is allowed (an integer given for a float becomes one); raise otherwise.

        `where` names the part, such as `lookahead`. Tensors of one element pass unread: reading one
        would wait for its device. Numbers of numpy become Python's. Raises HyperparameterError.
        """
        value = plain(value)
        if self.choices is not None:
            if value in self.choices:
                return value
            raise HyperparameterError(f"{where}: {self.name} must be {self.bounds()}, got {value!r:.80}")
        if isinstance(value, torch.Tensor) and value.numel() == 1 and self.schedulable:
            return value
        value = self._of_type(value, where)
        for number in value if isinstance(value, tuple | list) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                self._within_bounds(number, where)
                self._as_float(number, where)  # what divides by a count would raise in the middle of a run
        return value

    def _of_type(self, value: Any, where: str) -> Any:
        allowed = _alternatives(self.type)
        if not allowed or Any in allowed:
            return value
        if float in allowed and isinstance(value, int) and not isinstance(value, bool) and int not in allowed:
            return self._as_float(value, where)
        plain = tuple(typing.get_origin(kind) or kind for kind in allowed)
        if isinstance(value, bool) and bool not in plain:
            fits = False
        else:
            fits = isinstance(value, tuple(kind for kind in plain if isinstance(kind, type)))
        if not fits and tuple in plain and isinstance(value, list):
            return tuple(value)
        if not fits:
            names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in plain)
            raise HyperparameterError(
                f"{where}: {self.name} must be {names.replace('NoneType', 'None')}, got {value!r:.80}"
            )
        return value

    def _as_float(self, number: float, where: str) -> float:
        try:
            return float(number)
        except OverflowError:  # python's integers have no end, its floats have
            raise HyperparameterError(f"{where}: {self.name} is an integer beyond every float") from None

    def within_closed_bounds(self, number: float) -> bool:
        """Return whether a number is within the bounds or on one of them, open or not."""
        lower = [limit for limit in (self.ge, self.gt) if limit is not None]
        upper = [limit for limit in (self.le, self.lt) if limit is not None]
        return all(number >= limit for limit in lower) and all(number <= limit for limit in upper)

    def _within_bounds(self, number: float, where: str) -> None:
        outside = (
            number != number  # not a number; math.isnan would make a float of any integer
            or (self.ge is not None and number < self.ge)
            or (self.le is not None and number > self.le)
            or (self.gt is not None and number <= self.gt)
            or (self.lt is not None and number >= self.lt)
        )
        if outside:
            allowed = self.bounds() or "a number"
            raise HyperparameterError(f"{where}: {self.name} must be {allowed}, got {number!r}")


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the types that an annotation allows: `int | None` -> (int, NoneType)."""
    if kind is None:
        return ()
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return tuple({type(choice) for choice in typing.get_args(kind)})
    return (kind,)


def hyper(
    default: Any = REQUIRED,
    *,
    ge: float | None = None,
    le: float | None = None,
    gt: float | None = None,
    lt: float | None = None,
    choices: tuple[Any, ...] | None = None,
    doc: str = "",
    known_as: tuple[str, ...] = (),
    per_group: bool = True,
    defines_state: bool = False,
) -> Any:
    """Declare a hyperparameter in a class body: `alpha: float = hyper(0.5, gt=0.0, doc="...")`.

    Name and type come from the class body. `ge` and `le` are bounds that are allowed values, `gt` and `lt` are not;
    `known_as` lists what other libraries call it, for help and for errors. `per_group=False` is for what acts on all
    groups at once, such as the bound of a global norm: groups cannot set it apart. `defines_state=True` is for what
    decides which state is kept, such as its dtype: all groups share it, and the live stack's survives a load.
    """
    shared = defines_state or not per_group
    return Hyperparameter("", default, None, ge, le, gt, lt, choices, doc, known_as, not shared, defines_state)


def declared(owner: type) -> dict[str, Hyperparameter]:
    """Return the hyperparameters that a class declares with `hyper`, in order, inherited ones first."""
    found: dict[str, Hyperparameter] = {}
    hints = typing.get_type_hints(owner)
    for ancestor in reversed(owner.__mro__):
        for name, value in vars(ancestor).items():
            if isinstance(value, Hyperparameter):
                found[name] = replace(value, name=name, type=hints.get(name))
    return found


def from_signature(factory: Callable[..., Any], *, skip_first: bool = True) -> dict[str, Hyperparameter]:
    """Return the hyperparameters of an optimizer class (or factory), read from its signature.

    The first parameter of an optimizer holds the model's parameters and is left out. Annotations of tensors are
    reduced to their plain type (`float | Tensor` -> float); where none is given, the type of the default serves.
    """
    return dict(_read_signature(factory, skip_first))


@cache  # a pipeline asks for it at every look at a part, and annotations take milliseconds to resolve
def _read_signature(factory: Callable[..., Any], skip_first: bool) -> dict[str, Hyperparameter]:
    found: dict[str, Hyperparameter] = {}
    parameters = list(inspect.signature(factory).parameters.values())[1 if skip_first else 0 :]
    try:
        initializer = factory.__init__ if isinstance(factory, type) else factory  # type: ignore[misc]
        hints = typing.get_type_hints(initializer)
    except Exception:  # annotations of foreign code may name what cannot be resolved; defaults then serve
        hints = {}
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default = REQUIRED if parameter.default is parameter.empty else parameter.default
        kind = _plain_type(hints.get(parameter.name), default)
        found[parameter.name] = Hyperparameter(parameter.name, default, kind)
    return found


def _plain_type(hint: Any, default: Any) -> Any:
    kinds = [kind for kind in _alternatives(hint) if kind is not torch.Tensor]
    if any(typing.get_origin(kind) is tuple for kind in kinds):
        return tuple | list
    if hint is None or not all(isinstance(kind, type) for kind in kinds):
        if isinstance(default, tuple):
            return tuple | list
        if isinstance(default, int | float) and not isinstance(default, bool):
            # 0 as a default says nothing about the type: SGD's momentum is a float
            return float if isinstance(default, float) or default == 0 else int | float
        return bool if isinstance(default, bool) else None
    if float in kinds:
        kinds = [kind for kind in kinds if kind is not int]
    result = kinds[0] if kinds else None
    for kind in kinds[1:]:
        result = result | kind
    return result


def bind(
    hyperparameters: Mapping[str, Hyperparameter], where: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Match call arguments with declared hyperparameters; return those that were given, unchecked, by name.

    Raises HyperparameterError for one too many, an unknown one (with the nearest names) or one given twice.
    """
    names = list(hyperparameters)
    if len(args) > len(names):
        raise HyperparameterError(f"{where} takes at most {len(names)} hyperparameters, not {len(args)}: {names}")
    given = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in hyperparameters:
            raise HyperparameterError(f"{where} has no hyperparameter {name!r}.{_nearest(name, hyperparameters)}")
        if name in given:
            raise HyperparameterError(f"{where}: {name} is given twice, by position and by name")
        given[name] = value
    return given


def _nearest(name: str, hyperparameters: Mapping[str, Hyperparameter]) -> str:
    for own in hyperparameters.values():
        if name in own.known_as:
            return f" Here it is called {own.name}."
    return did_you_mean(name, hyperparameters) or f" It has: {', '.join(hyperparameters) or 'none'}."
