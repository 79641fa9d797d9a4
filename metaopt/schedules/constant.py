"""A value that does not change."""

from collections.abc import Callable

from metaopt import Schedule, hookimpl, hyper


class Constant(Schedule):
    """v(t) = value."""

    known_as = ("ConstantLR", "constant_schedule")
    value: float = hyper(doc="the value")

    def curve(self, run: int | None, span: int | None) -> Callable[[float], float]:
        return lambda t: self.value


@hookimpl
def metaopt_schedules() -> dict[str, type[Schedule]]:
    return {"constant": Constant}
