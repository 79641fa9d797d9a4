"""The mean of the weights over the last part of a run."""

import torch

from metaopt import Example, Group, Wrapper, hookimpl, hyper
from metaopt import start as copy_of_start


class TailAverage(Wrapper, every="every", elementwise=True):
    """average <- average + (w - average) / n at the n-th sample: SWA's equal weights. arXiv:1803.05407

    A sample is taken after every `every`-th update past update `start`. `opt.averaged()` shows the mean of all samples,
    and the current weights before the first. Statistics of a model (batch norm) are the caller's to renew.
    """

    known_as = ("swa", "SWA", "stochastic weight averaging", "Polyak-Ruppert averaging")
    acts_on_frozen = True

    start: int = hyper(0, ge=0, doc="the update after which samples are taken", known_as=("swa_start",))
    every: int = hyper(1, ge=1, doc="updates between samples", known_as=("cycle_length", "swa_freq"))
    # 1 / n of the way soon becomes too little for an average of 16 bits
    average = copy_of_start(dtype="at least float32")

    def after_update(self, group: Group) -> None:
        samples = _samples(group)
        if samples < 1:
            return
        # a parameter that has its first gradient late has stayed until then where its average begins
        torch._foreach_lerp_(group.average, group.cast(group.params), 1.0 / samples)

    def averaged(self, group: Group) -> list[torch.Tensor] | None:
        average: list[torch.Tensor] = group.average
        return average if _samples(group) > 0 else None


def _samples(group: Group) -> int:
    """Return how many samples have been taken, the present one included."""
    number: int = group.updates // group.every - group.start // group.every
    return number


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"tail_average": TailAverage}


@hookimpl
def metaopt_examples() -> dict[str, list[Example]]:
    return {
        "tail_average": [
            Example("tail_average"),
            Example("tail_average(start=1, every=2)"),
        ]
    }
