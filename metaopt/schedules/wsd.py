"""Warm-up, stable, decay: a rate that stays at its peak until the last part of the run."""

from collections.abc import Callable

from metaopt import HyperparameterError, Schedule, hookimpl, hyper


class Wsd(Schedule):
    """v rises linearly from start to peak in `warmup`, stays, and falls linearly to end in the last `decay` of steps.

    A part of length 0 is left out.
    v(t) = end + (peak - end) min(1, (steps - t) / decay) after the warm-up. arXiv:2404.06395
    """

    known_as = ("get_wsd_schedule", "warmup_stable_decay")
    peak: float = hyper(doc="the value between warm-up and decay", known_as=("max_lr", "peak_value"))
    warmup: int | float = hyper(
        0.05, doc="updates, or a fraction of the run", known_as=("warmup_steps", "num_warmup_steps")
    )
    decay: int | float = hyper(0.2, doc="updates, or a fraction of the run", known_as=("num_decay_steps",))
    end: float = hyper(0.0, doc="the last value", known_as=("end_value",))
    start: float = hyper(0.0, doc="the value at the first update", known_as=("init_value",))
    steps: int | float | None = hyper(None, doc="updates, a fraction of the run, or None: to its end")

    def curve(self, run: int | None, span: int | None) -> Callable[[float], float]:
        steps = self.resolve_steps(self.steps, run, span)
        warmup = self.resolve_steps(self.warmup, run, span, least=0)
        decay = self.resolve_steps(self.decay, run, span, least=0)
        if warmup + decay > steps:
            raise HyperparameterError(f"wsd: warmup={warmup} and decay={decay} together exceed its {steps} updates")

        def value(t: float) -> float:
            if t < warmup:
                return self.start + (self.peak - self.start) * t / warmup
            if decay == 0:
                return self.peak
            return self.end + (self.peak - self.end) * min(1.0, max(0.0, (steps - t) / decay))

        return value


@hookimpl
def metaopt_schedules() -> dict[str, type[Schedule]]:
    return {"wsd": Wsd}
