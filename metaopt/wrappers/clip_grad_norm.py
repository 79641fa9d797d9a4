"""Clipping by the global norm of all gradients."""

from metaopt import Groups, Wrapper, hookimpl, hyper


class ClipGradNorm(Wrapper):
    """g <- g min(1, max_norm / (|g| + 1e-6)), with |g| over all parameters together. arXiv:1211.5063"""

    known_as = (
        "clip",
        "gradient_clipping",
        "clip_by_global_norm",
        "gradient_clip_val",
        "max_grad_norm",
        "clip_grad_norm_",
    )
    clips_gradients = True
    measures = {"clipped_fraction": "the share of updates that were clipped"}

    max_norm: float = hyper(
        gt=0.0,
        doc="the largest norm that passes unchanged",
        known_as=("clip_value", "max_grad_norm"),
        per_group=False,
    )
    norm_type: float = hyper(2.0, gt=0.0, doc="the p of the norm; inf is allowed", known_as=("p",), per_group=False)

    def on_gradients(self, groups: Groups) -> None:
        norm = groups.norm(groups.norm_type)
        # as in torch: an infinite norm scales to zero or NaN, it is not hidden
        # max_norm / (norm + 1e-6), in place: over small tensors arithmetic on one number costs as much as the norm
        factor = (norm + 1e-6).reciprocal_().mul_(groups.max_norm).clamp_(max=1.0)
        groups.scale(factor)
        if groups.has_logger or groups.is_logged:
            groups.measure("clipped_fraction", factor < 1.0)


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"clip_grad_norm": ClipGradNorm}
