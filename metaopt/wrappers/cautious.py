"""Cautious updates: only where the update goes down the gradient."""

import torch

from metaopt import Group, Wrapper, hookimpl, previous


class Cautious(Wrapper):
    """u <- u m / max(mean(m), 0.001), m = 1 where u g < 0 and else 0, for each tensor's update u. arXiv:2411.16085

    u is the whole change that the base made: a decay of the weights inside it is masked as well, one that is written
    before the base, as `decay(0.1) | adam | cautious`, is not. Where the base maximizes, m = 1 where u g > 0. It moves
    the weights at every update, and slow weights nearer the base follow: write a Lookahead behind it.
    """

    known_as = ("C-AdamW", "C-Lion", "caution", "cautious optimizer")

    before = previous()

    def after_update(self, group: Group) -> None:
        agreeing: list[list[torch.Tensor]] = [[] for _ in group.params]
        for block in group.blocks():
            masks = [_mask(*each, up=group.maximize) for each in zip(*_weights_and_gradients(block), strict=True)]
            for i, mask in zip(block.index, masks, strict=True):
                agreeing[i].append(mask.sum(dtype=_wide(mask)))
            # to lerp between the two is to choose, where a mask is 0 or 1
            block.set_params(list(torch._foreach_lerp(block.before, block.params, masks)))
        shares = group.means([torch.stack(counts) for counts in agreeing])
        stretches = [1.0 / share.real.clamp(min=1e-3) for share in shares]
        for block in group.blocks():
            updates = torch._foreach_sub(block.params, block.before)
            torch._foreach_mul_(updates, [stretches[i] for i in block.index])
            torch._foreach_add_(updates, block.before)
            block.set_params(list(updates))


def _weights_and_gradients(block: Group) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    return block.params, block.before, block.grads


def _mask(now: torch.Tensor, before: torch.Tensor, gradient: torch.Tensor, *, up: bool) -> torch.Tensor:
    """Return 1 for each component whose update goes down the gradient (or up) and else 0; complex ones by their angle.

    The product of two small numbers is zero in 16 bits.
    """
    product = torch.sub(now, before).to(_wide(now)).mul_(gradient.conj()).real
    # in place: as truth values the comparison would take nine times as long on a processor
    return (product.gt_(0) if up else product.lt_(0)).to(now.dtype)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"cautious": Cautious}
