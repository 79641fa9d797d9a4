"""Values that can be counted: a list of any, or the whole numbers between two."""

from collections.abc import Sequence
from typing import Any

from metaopt import Example, HyperparameterError, Space, hookimpl, hyper


class Choice(Space):
    """choice(a, b, ...): one of these, each as likely as any other: numbers, text, None, tuples or schedules."""

    known_as = ("categorical", "grid_search")
    positional: tuple[Any, ...]

    def __init__(self, *options: Any) -> None:
        if len(options) < 2:
            raise HyperparameterError(f"choice takes two values or more, got {len(options)}: choice(0.9, 0.95)")
        for position, option in enumerate(options):
            if any(type(option) is type(other) and option == other for other in options[:position]):
                raise HyperparameterError(f"choice: each value is given once, got {option!r:.60} twice")
        self.given = {}
        self.positional = options

    def value(self, u: float) -> Any:
        return _at(self.options(), u)

    def options(self) -> Sequence[Any]:
        return self.positional


class Integers(Space):
    """The whole numbers low, low + 1, ..., high, each as likely as any other."""

    ordered = True
    known_as = ("randint", "int_uniform", "IntUniform")
    low: int = hyper(doc="the least value", known_as=("min", "lower"))
    high: int = hyper(doc="the greatest value, included", known_as=("max", "upper"))

    def validate(self) -> None:
        if not self.low < self.high:
            raise HyperparameterError(f"integers: high must be above low, got {self.low} and {self.high}")

    def value(self, u: float) -> int:
        return int(_at(self.options(), u))

    def options(self) -> Sequence[int]:
        return range(self.low, self.high + 1)


def _at(options: Sequence[Any], u: float) -> Any:
    return options[min(int(u * len(options)), len(options) - 1)]


@hookimpl
def metaopt_spaces() -> dict[str, type[Space]]:
    return {"choice": Choice, "integers": Integers}


@hookimpl
def metaopt_examples() -> dict[str, Example]:
    return {"choice": Example("choice(0.9, 0.95, (0.9, 0.99), 'text', None)"), "integers": Example("integers(2, 20)")}
