"""Cautious updates: only where the update goes down the gradient."""

import torch
from torch import Tensor

from metaopt import Group, Wrapper, elementwise, hookimpl


def _go_down(update: Tensor, grad: Tensor) -> dict[str, Tensor]:
    return {"update": _masked(update, (update * grad.conj()).real < 0)}


def _go_up(update: Tensor, grad: Tensor) -> dict[str, Tensor]:
    return {"update": _masked(update, (update * grad.conj()).real > 0)}


def _masked(update: Tensor, mask: Tensor) -> Tensor:
    return update * mask * torch.reciprocal(torch.clamp(torch.mean(mask), min=1e-3))


class Cautious(Wrapper):
    """u <- u m / max(mean(m), 0.001), m = 1 where u g < 0 and otherwise 0, for each tensor's update u. arXiv:2411.16085

    u is the whole change that the base makes: a decay of the weights inside it is masked as well, one that is written
    before the base, as `decay(0.1) | adam | cautious`, is not. Behind a Lookahead u has the pull in it: write the
    Lookahead behind this. If the base maximizes, m = 1 where u g > 0. Complex components agree by their angle.
    """

    known_as = ("C-AdamW", "C-Lion", "caution", "cautious optimizer")

    go_down, go_up = elementwise(_go_down), elementwise(_go_up)

    def on_update(self, group: Group) -> None:
        updates = group.update
        masks = [_mask(u, g, up=group.maximize) for u, g in zip(updates, group.grads, strict=True)]
        torch._foreach_mul_(updates, masks)
        shares = torch.stack(group.means(masks))
        torch._foreach_mul_(updates, shares.clamp_(min=1e-3).reciprocal_().unbind())

    def update_rules(self, group: Group) -> None:
        if group.maximize:
            self.go_up(group)
        else:
            self.go_down(group)


def _mask(update: torch.Tensor, gradient: torch.Tensor, *, up: bool) -> torch.Tensor:
    """Return 1 for each component whose update goes down the gradient (or up) and otherwise 0.

    An update has 32 bits or more, so that the product of two small numbers is not zero.
    """
    product = (update * gradient.conj()).real
    # in place: as truth values the comparison would take three times as long on a processor
    return product.gt_(0) if up else product.lt_(0)


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"cautious": Cautious}
