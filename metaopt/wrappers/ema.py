"""An exponential moving average of the weights."""

import torch
from torch import Tensor

from metaopt import Example, Group, Wrapper, elementwise, hookimpl, hyper
from metaopt import start as copy_of_start


class Ema(Wrapper, every="every"):
    """average <- d average + (1 - d) w after every update; `opt.averaged()` shows it. doi:10.1137/0330046

    d = decay; with `warmup` d = min(decay, (1 + t) / (10 + t)), t being how often the average has been updated, so that
    the first weights are soon forgotten. Up to update `start` the average is the weights themselves. The average of a
    frozen parameter goes on toward the weights that stay.
    """

    known_as = ("EMA", "ModelEmaV3", "EMAModel", "AveragedModel", "ExponentialMovingAverage", "polyak averaging")
    acts_on_frozen = True

    decay: float = hyper(
        0.999, ge=0.0, lt=1.0, doc="how much of the average is kept each time it is updated", known_as=("beta",)
    )
    warmup: bool = hyper(False, doc="begin with a shorter memory", known_as=("use_warmup", "num_updates"))
    average_dtype: str | None = hyper(
        None,
        choices=(None, "float32"),
        doc="the dtype of the average; None: the parameter's own, in 16 bits too coarse for a decay near 1",
        defines_state=True,
    )
    start: int = hyper(
        0, ge=0, doc="the update after which averaging begins", known_as=("update_after_step", "ema_start")
    )
    every: int = hyper(1, ge=1, doc="updates between updates of the average", known_as=("update_every", "ema_freq"))
    device: str | None = hyper(
        None,
        choices=(None, "cpu"),
        doc="where the average is kept: 'cpu' is main memory; None: beside the parameter",
        known_as=("offload", "offload_to_cpu"),
        defines_state=True,
    )
    average = copy_of_start(dtype="average_dtype", device="device")

    @elementwise
    @staticmethod
    def follow(param: Tensor, average: Tensor, *, share: float) -> dict[str, Tensor]:
        return {"average": torch.lerp(average, param, share)}

    @elementwise
    @staticmethod
    def begin(param: Tensor, average: Tensor) -> dict[str, Tensor]:
        return {"average": param}

    def after_update(self, group: Group) -> None:
        if group.updates <= group.start:
            if group.updates + group.every > group.start:  # the last time before averaging begins
                self.begin(group)
            return
        decay = group.decay
        if group.warmup:
            number = group.updates // group.every - group.start // group.every
            decay = min(decay, (1 + number) / (10 + number))
        self.follow(group, share=1.0 - decay)

    def averaged(self, group: Group) -> list[torch.Tensor] | None:
        average: list[torch.Tensor] = group.average
        return average if group.updates > group.start else None


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"ema": Ema}


@hookimpl
def metaopt_examples() -> dict[str, list[Example]]:
    return {
        "ema": [
            Example("ema"),
            Example("ema(0.9, warmup=True, start=2, every=2)"),
            Example("ema(0.9, average_dtype='float32', device='cpu')"),
        ]
    }
