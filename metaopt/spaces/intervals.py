"""All numbers between two: evenly, or evenly by factors."""

import math

from metaopt import Example, HyperparameterError, Space, hookimpl, hyper

# a value has so few digits that it can be pasted, and so many that a thousandth of the interval still differs
FINEST = 1000


class Log(Space):
    """x(u) = low (high / low)^u: each factor is as likely as any other, as suits a learning rate."""

    known_as = ("loguniform", "log_uniform", "LogUniform")
    low: float = hyper(gt=0.0, doc="the least value", known_as=("min", "lower"))
    high: float = hyper(gt=0.0, doc="the greatest value", known_as=("max", "upper"))

    def validate(self) -> None:
        _check_order("log", self.low, self.high)

    def value(self, u: float) -> float:
        digits = max(3, 1 + _digits(math.log(self.high / self.low)))
        value = math.exp(math.log(self.low) + u * (math.log(self.high) - math.log(self.low)))
        return min(max(float(f"{value:.{digits}g}"), self.low), self.high)


class Uniform(Space):
    """x(u) = low + (high - low) u: each value is as likely as any other."""

    known_as = ("float_uniform",)
    low: float = hyper(doc="the least value", known_as=("min", "lower"))
    high: float = hyper(doc="the greatest value", known_as=("max", "upper"))

    def validate(self) -> None:
        _check_order("uniform", self.low, self.high)

    def value(self, u: float) -> float:
        value = self.low + u * (self.high - self.low)
        return min(max(round(value, _digits(self.high - self.low)), self.low), self.high)


def _check_order(where: str, low: float, high: float) -> None:
    if not math.isfinite(high - low) or not low < high:
        raise HyperparameterError(f"{where}: high must be a finite number above low, got {low!r} and {high!r}")


def _digits(length: float) -> int:
    """Return how many decimal places tell a thousandth of a length apart."""
    return math.ceil(-math.log10(length / FINEST))


@hookimpl
def metaopt_spaces() -> dict[str, type[Space]]:
    return {"log": Log, "uniform": Uniform}


@hookimpl
def metaopt_examples() -> dict[str, Example]:
    return {"log": Example("log(1e-4, 1e-1)"), "uniform": Example("uniform(0.3, 1)")}
