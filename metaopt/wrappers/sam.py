"""Sharpness-aware minimisation: the gradient is taken where the loss is worst nearby."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from metaopt import Group, Groups, Wrapper, hookimpl, hyper


class Sam(Wrapper):
    """g <- gradient at w + rho g / |g|; adaptive: at w + rho w^2 g / | |w| g |. arXiv:2010.01412, arXiv:2102.11600

    |g| is over all parameters together. Two evaluations of the loss per update, so `step(closure)` is needed, which
    torch's GradScaler cannot hand over: use bfloat16 with it. The loss at w is the one returned, and a model's running
    statistics (batch norm) see only that evaluation. The weights come back exactly, also where the closure raises.
    """

    known_as = ("SAM", "ASAM", "sharpness-aware minimization")

    rho: float = hyper(0.05, ge=0.0, doc="how far from the weights the gradient is taken")
    adaptive: bool = hyper(
        False,
        doc="measure that distance relative to each weight's size (ASAM), with a rho about ten times as large",
        known_as=("asam",),
        per_group=False,
    )

    def around(self, closure: Callable[[], Any], groups: Groups) -> Any:
        loss = closure()
        pieces = list(groups)
        if not pieces:
            return loss
        norm = _adaptive_norm(pieces) if groups.adaptive else groups.norm()
        kept = [group.copies(group.params) for group in pieces]
        try:
            for group in pieces:
                _climb(group, norm, adaptive=groups.adaptive)
                # also where the closure does not clear them, the gradient is that of the second evaluation alone
                group.clear_grads()
            with groups.buffers_kept():
                closure()
        finally:
            for group, weights in zip(pieces, kept, strict=True):
                torch._foreach_copy_(group.params, weights)
        return loss


def _climb(group: Group, norm: torch.Tensor, *, adaptive: bool) -> None:
    norm = norm.to(group.params[0].device)
    # gradients that are all zero have no direction; a small number added to the norm would be lost in 16 bits
    directions = list(torch._foreach_div(group.cast(group.grads), torch.where(norm == 0, 1.0, norm)))
    torch._foreach_mul_(directions, -group.rho if group.maximize else group.rho)
    if adaptive:
        sizes = torch._foreach_abs(group.cast(group.params))
        torch._foreach_mul_(directions, sizes)
        torch._foreach_mul_(directions, sizes)
    group.add(group.params, directions)


def _adaptive_norm(pieces: Iterable[Group]) -> torch.Tensor:
    norms = [group.stack(group.norms(list(torch._foreach_mul(group.grads, group.params)))) for group in pieces]
    total: torch.Tensor = torch.linalg.vector_norm(torch.cat([n.to(norms[0].device) for n in norms]))
    return total


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"sam": Sam}
