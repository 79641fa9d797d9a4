"""Rates that fall as one over the square root of the count."""

from collections.abc import Callable

from metaopt import Schedule, hookimpl, hyper


class Noam(Schedule):
    """v(t) = factor d_model^-0.5 min(s^-0.5, s warmup^-1.5), s = t + 1 the number of the update. arXiv:1706.03762"""

    known_as = ("NoamOpt", "NoamLR")
    d_model: int = hyper(512, ge=1, doc="the width of the model")
    warmup: int = hyper(4000, ge=0, doc="updates until the peak", known_as=("warmup_steps",))
    factor: float = hyper(1.0, gt=0.0, doc="multiplies every value")

    def curve(self, run: int | None, span: int | None) -> Callable[[float], float]:
        scale = self.factor * self.d_model**-0.5
        if self.warmup == 0:
            return lambda t: float(scale * (t + 1) ** -0.5)
        return lambda t: scale * min((t + 1) ** -0.5, (t + 1) * self.warmup**-1.5)


class InverseSqrt(Schedule):
    """v(t) = start + (peak - start) t / warmup for t < warmup, then peak sqrt(warmup / t). arXiv:1706.03762"""

    known_as = ("get_inverse_sqrt_schedule", "inverse_square_root")
    peak: float = hyper(doc="the value at the end of the warm-up", known_as=("max_lr", "peak_value"))
    warmup: int | float = hyper(doc="updates, or a fraction of the run", known_as=("warmup_steps", "num_warmup_steps"))
    start: float = hyper(0.0, doc="the value at the first update", known_as=("init_value", "warmup_init_lr"))

    def curve(self, run: int | None, span: int | None) -> Callable[[float], float]:
        warmup = self.resolve_steps(self.warmup, run, span, least=0)

        def value(t: float) -> float:
            if t < warmup:
                return self.start + (self.peak - self.start) * t / warmup
            return float(self.peak * (max(warmup, 1) / max(t, 1.0)) ** 0.5)

        return value


@hookimpl
def metaopt_schedules() -> dict[str, type[Schedule]]:
    return {"noam": Noam, "inverse_sqrt": InverseSqrt}
