"""MARS: the gradient corrected by its change, before any base uses it."""

import torch

from metaopt import Groups, Wrapper, hookimpl, hyper, zeros


class Mars(Wrapper):
    """c = g + gamma beta1 / (1 - beta1) (g - g_before); g <- c / max(1, |c|) for each tensor. arXiv:2411.10438

    This is the variant that takes g_before from the step before, not from a second pass over the same data; it is zero
    at first. With Adam or AdamW behind it it is MARS-AdamW, with Lion MARS-Lion; `beta1` is the beta1 of the base.
    """

    known_as = ("MARS", "MARS-AdamW", "MARS-Lion", "variance reduction")

    gamma: float = hyper(0.025, ge=0.0, doc="how much of the change of the gradient is added")
    beta1: float = hyper(0.95, ge=0.0, lt=1.0, doc="the memory of the base's momentum")
    before = zeros(early=True)

    def on_gradients(self, groups: Groups) -> None:
        for group in groups:
            factor = group.gamma * group.beta1 / (1.0 - group.beta1)
            for block in group.blocks():
                changes = torch._foreach_sub(block.grads, block.before)
                torch._foreach_copy_(block.before, block.grads)
                torch._foreach_add_(block.grads, changes, alpha=factor)
            gradients = group.grads
            group.multiply(gradients, group.stack(group.norms(gradients)).clamp(min=1.0).reciprocal())


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"mars": Mars}
