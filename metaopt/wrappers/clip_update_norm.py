"""Clipping by the global norm of what an update adds to the weights."""

import torch

from metaopt import Groups, Wrapper, hookimpl, hyper


class ClipUpdateNorm(Wrapper):
    """u <- u min(1, max_norm / |u|), |u| being the distance that the update moves all weights together.

    The rule of `clip_grad_norm` (arXiv:1211.5063), on what the base makes of the gradients, lr included.
    """

    known_as = ("max_update_norm", "trust region", "global update clipping")
    measures = {"clipped_fraction": "the share of updates that were clipped"}

    max_norm: float = hyper(1.0, gt=0.0, doc="the largest distance", known_as=("max_delta",), per_group=False)

    def after_updates(self, groups: Groups) -> None:
        norm = groups.norm_of("update")
        factor = torch.where(norm > groups.max_norm, groups.max_norm / norm, 1.0)
        for group in groups:
            torch._foreach_mul_(group.update, factor.to(group.update[0].device))
        if groups.has_logger or groups.is_logged:
            groups.measure("clipped_fraction", factor < 1.0)


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"clip_update_norm": ClipUpdateNorm}
