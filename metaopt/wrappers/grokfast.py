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
        for block in (block for group in groups for block in group.blocks()):
            gradients, averages = block.grads, block.average
            # an average that begins at zero would be too small for 1 / (1 - alpha) steps
            known = torch._foreach_abs(averages)
            torch._foreach_sign_(known)
            torch._foreach_sub_(known, 1.0)
            torch._foreach_addcmul_(averages, known, gradients, value=-1.0)
            torch._foreach_lerp_(averages, gradients, 1.0 - block.alpha)
            torch._foreach_add_(gradients, averages, alpha=block.lamb)


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"grokfast": Grokfast}
