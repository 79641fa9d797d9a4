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
        for part in group.parts():
            masks = [_mask(*each, up=group.maximizes) for each in zip(*_weights_and_gradients(part), strict=True)]
            for i, mask in zip(part.at, masks, strict=True):
                agreeing[i].append(mask.sum(dtype=_wide(mask)))
            # to lerp between the two is to choose, where a mask is 0 or 1
            part.move_to(list(torch._foreach_lerp(part.before, part.params, masks)))
        shares = group.means([torch.stack(counts) for counts in agreeing])
        stretches = [1.0 / share.real.clamp(min=1e-3) for share in shares]
        for part in group.parts():
            updates = torch._foreach_sub(part.params, part.before)
            torch._foreach_mul_(updates, [stretches[i] for i in part.at])
            torch._foreach_add_(updates, part.before)
            part.move_to(list(updates))


def _weights_and_gradients(part: Group) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    return part.params, part.before, part.grads


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
