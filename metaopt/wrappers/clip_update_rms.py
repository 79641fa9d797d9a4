"""Clipping each tensor's update by its root mean square, as Adafactor does."""

import torch
from torch import Tensor

from metaopt import Group, Wrapper, elementwise, hookimpl, hyper


def _clip(update: Tensor, *, lr: float, max_rms: float) -> dict[str, Tensor]:
    size, bound = torch.sqrt(torch.mean((update * update.conj()).real)), lr * max_rms
    return {"update": update * torch.where(size > bound, bound / size, 1.0)}


class ClipUpdateRms(Wrapper):
    """u <- u / max(1, RMS(u / lr) / max_rms) for each tensor, RMS(x) = sqrt(mean(x^2)). arXiv:1804.04235

    u / lr is the base's update at rate 1, whose components Adam makes about 1 large where gradients are steady.
    """

    known_as = ("clip_by_block_rms", "clip_threshold", "Adafactor's update clipping", "StableAdamW")

    max_rms: float = hyper(1.0, gt=0.0, doc="the largest RMS of an update at rate 1", known_as=("d", "threshold"))

    clip = elementwise(_clip)

    def on_update(self, group: Group) -> None:
        squares = [torch.vdot(u.flatten(), u.flatten()) for u in group.update]
        sizes = group.stack(group.means(squares)).real.sqrt()
        bound = group.base_lr * group.max_rms
        group.multiply(group.update, torch.where(sizes > bound, bound / sizes, 1.0))

    def update_rules(self, group: Group) -> None:
        self.clip(group)


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"clip_update_rms": ClipUpdateRms}
