"""Clipping each tensor's update by its root mean square, as Adafactor does."""

import torch

from metaopt import Group, Wrapper, hookimpl, hyper


class ClipUpdateRms(Wrapper):
    """u <- u / max(1, RMS(u / lr) / max_rms) for each tensor, RMS(x) = sqrt(mean(x^2)). arXiv:1804.04235

    u / lr is the base's update at rate 1, whose components Adam makes about 1 large where gradients are steady.
    """

    known_as = ("clip_by_block_rms", "clip_threshold", "Adafactor's update clipping", "StableAdamW")

    max_rms: float = hyper(1.0, gt=0.0, doc="the largest RMS of an update at rate 1", known_as=("d", "threshold"))

    def on_update(self, group: Group) -> None:
        squares = [torch.vdot(u.flatten(), u.flatten()) for u in group.update]
        sizes = torch.stack(group.means(squares)).real.sqrt()
        bound = group.base_lr * group.max_rms
        torch._foreach_mul_(group.update, torch.where(sizes > bound, bound / sizes, 1.0).unbind())


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"clip_update_rms": ClipUpdateRms}
