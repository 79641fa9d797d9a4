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
            gradients, factor = group.grads, group.gamma * group.beta1 / (1.0 - group.beta1)
            for gradient, before in zip(
                gradients, group.before, strict=True
            ):  # one change at a time takes little memory
                change = gradient - before
                before.copy_(gradient)
                gradient.add_(change, alpha=factor)
            sizes = group.norms(gradients)
            torch._foreach_div_(gradients, [s.clamp(min=1.0).to(gradients[0].dtype) for s in sizes])


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"mars": Mars}
