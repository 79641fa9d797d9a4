"""Cautious updates: only where the update goes down the gradient."""

import torch

from metaopt import Group, Wrapper, hookimpl, previous


class Cautious(Wrapper, each="tensor"):
    """u <- u m / max(mean(m), 0.001), m = 1 where u g < 0 and else 0, for each tensor's update u. arXiv:2411.16085

    u is the whole change that the base made: a decay of the weights inside it is masked as well, one that is written
    before the base, as `decay(0.1) | adam | cautious`, is not. Where the base maximizes, m = 1 where u g > 0.
    """

    known_as = ("C-AdamW", "C-Lion", "caution", "cautious optimizer")

    before = previous()

    def after_update(self, group: Group) -> None:
        updates = torch._foreach_sub(group.params, group.before)
        wanted = 1 if group.maximizes else -1
        agrees = [_points(u, g, wanted).to(u.dtype) for u, g in zip(updates, group.grads, strict=True)]
        shares = [mean.real.clamp(min=1e-3) for mean in group.means(agrees)]
        torch._foreach_mul_(updates, agrees)
        torch._foreach_div_(updates, shares)
        torch._foreach_add_(updates, group.before)
        group.move_to(list(updates))


def _points(update: torch.Tensor, gradient: torch.Tensor, way: int) -> torch.Tensor:
    """Tell for each component whether it points along the gradient (1) or against it (-1), complex ones by their angle.

    By signs, not by the product: that of two small numbers is zero in 16 bits.
    """
    return (update.sgn() * gradient.sgn().conj()).real * way > 0


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"cautious": Cautious}
