"""The mean of the latest few samples of the weights."""

import torch

from metaopt import Example, Group, Wrapper, hookimpl, hyper, start, zeros


class Lawa(Wrapper, every="k", elementwise=True):
    """average = (w_s + w_(s-k) + ... + w_(s-(n-1)k)) / n, s being the last update that k divides. arXiv:2209.14981

    `opt.averaged()` shows the mean of the samples that there are, and the current weights before the first. A sample is
    kept as its difference from the first weights: a parameter without a gradient so far has differences of zero.
    """

    known_as = ("LAWA", "latest weight averaging", "checkpoint averaging")
    acts_on_frozen = True

    k: int = hyper(ge=1, doc="updates between samples", known_as=("every",))
    n: int = hyper(ge=1, doc="how many samples are averaged", known_as=("history_len",), defines_state=True)
    first = start()
    samples = zeros(copies="n")

    def after_update(self, group: Group) -> None:
        # the oldest gives its place to the newest
        sample = group.samples[(group.updates // group.k - 1) % self.n]
        torch._foreach_copy_(sample, torch._foreach_sub(group.params, group.first))

    def averaged(self, group: Group) -> list[torch.Tensor] | None:
        number = min(group.updates // group.k, self.n)
        if number < 1:
            return None
        # in 16 bits every one of n additions would be rounded
        wide = torch.promote_types(group.first[0].dtype, torch.float32)
        average = [first.to(wide, copy=True) for first in group.first]
        for sample in group.samples[:number]:
            torch._foreach_add_(average, sample, alpha=1.0 / number)
        return average


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"lawa": Lawa}


@hookimpl
def metaopt_examples() -> dict[str, list[Example]]:
    return {"lawa": [Example("lawa(k=1, n=3)"), Example("lawa(k=2, n=2)")]}
