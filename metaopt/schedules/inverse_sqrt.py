"""Rates that fall as one over the square root of the count."""

from collections.abc import Callable

from metaopt import Schedule, hookimpl, hyper


class Noam(Schedule):
    """v(t) = factor d_model^-0.5 min(s^-0.5, s warmup^-1.5), s = t + 1 the number of the update. arXiv:1706.03762"""

    known_as = ("NoamOpt", "NoamLR")
    d_model: int = hyper(512, min=1, doc="the width of the model")
    warmup: int = hyper(4000, min=1, doc="updates until the peak", known_as=("warmup_steps",))
    factor: float = hyper(1.0, above=0.0, doc="multiplies every value")

    def over(self, run: int | None, span: int | None) -> Callable[[float], float]:
        scale = self.factor * self.d_model**-0.5
        return lambda t: scale * min((t + 1) ** -0.5, (t + 1) * self.warmup**-1.5)


@hookimpl
def metaopt_schedules() -> dict[str, type[Schedule]]:
    return {"noam": Noam}
