"""An exponential moving average of the weights."""

import torch

from metaopt import Group, Wrapper, hookimpl, hyper, start


class Ema(Wrapper):
    """average <- d average + (1 - d) w after every update; `opt.averaged()` shows it. doi:10.1137/0330046

    d = decay; with `warmup` d = min(decay, (1 + t) / (10 + t)), t being the number of updates, so that the initial
    weights are soon forgotten. The average of a frozen parameter goes on toward the weights that stay.
    """

    known_as = ("EMA", "ModelEmaV3", "EMAModel", "AveragedModel", "ExponentialMovingAverage", "polyak averaging")
    acts_on_frozen = True

    decay: float = hyper(0.999, ge=0.0, lt=1.0, doc="how much of the average an update keeps", known_as=("beta",))
    warmup: bool = hyper(False, doc="begin with a shorter memory", known_as=("use_warmup", "num_updates"))
    average_dtype: str | None = hyper(
        None,
        choices=(None, "float32"),
        doc="the dtype of the average; None: the parameter's own, in 16 bits too coarse for a decay near 1",
        defines_state=True,
    )
    average = start(dtype="average_dtype")

    def after_update(self, group: Group) -> None:
        decay = group.decay
        if group.warmup:
            decay = min(decay, (1 + group.updates) / (10 + group.updates))
        averages = group.average
        if all(a.dtype == p.dtype for a, p in zip(averages, group.params, strict=True)):
            torch._foreach_lerp_(averages, group.params, 1.0 - decay)
            return
        # a multi-tensor lerp refuses mixed dtypes; cast in parts, or all weights would be copied at once
        for block in group.blocks():
            for average, p in zip(block.average, block.params, strict=True):
                average.lerp_(p.to(average.dtype), 1.0 - decay)

    def averaged(self, group: Group) -> list[torch.Tensor]:
        average: list[torch.Tensor] = group.average
        return average


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"ema": Ema}
