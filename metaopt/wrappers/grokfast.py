"""Grokfast: the slow part of the gradient is amplified."""

import torch

from metaopt import Groups, Wrapper, hookimpl, hyper, zeros


class Grokfast(Wrapper):
    """average <- alpha average + (1 - alpha) g; g <- g + lamb average. arXiv:2405.20233

    This is Grokfast-EMA. The average of a component is its first gradient that is not zero.
    """

    known_as = ("Grokfast-EMA", "gradfilter_ema", "GrokFastAdamW")

    alpha: float = hyper(0.98, ge=0.0, lt=1.0, doc="how much of the average a step keeps", known_as=("grokfast_alpha",))
    lamb: float = hyper(2.0, ge=0.0, doc="how much of the average is added", known_as=("lambda", "grokfast_lamb"))
    average = zeros(early=True)

    def on_gradients(self, groups: Groups) -> None:
        for group in groups:
            gradients, averages = group.grads, group.average
            # an average that begins at zero would be too small for 1 / (1 - alpha) steps
            for average, g in zip(averages, gradients, strict=True):
                average.copy_(torch.where(average == 0, g, average))
            torch._foreach_lerp_(averages, gradients, 1.0 - group.alpha)
            torch._foreach_add_(gradients, averages, alpha=group.lamb)


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"grokfast": Grokfast}
