"""Clipping by the global norm of all gradients."""

from ctypes import c_float

import torch

from metaopt import Groups, Wrapper, hookimpl, hyper


class ClipGradNorm(Wrapper):
    """g <- g min(1, max_norm / (|g| + 1e-6)), with |g| over all parameters together. arXiv:1211.5063"""

    known_as = ("clip_by_global_norm", "gradient_clip_val", "max_grad_norm", "clip_grad_norm_")
    clips_gradients = True

    max_norm: float = hyper(
        ge=0.0,
        doc="the largest norm that passes unchanged",
        known_as=("clip_value", "max_grad_norm"),
        per_group=False,
    )
    norm_type: float = hyper(2.0, gt=0.0, doc="the p of the norm; inf is allowed", known_as=("p",), per_group=False)

    def on_gradients(self, groups: Groups) -> None:
        factor = _factor(groups.norm(groups.norm_type), groups.max_norm)
        groups.scale(factor)
        if groups.has_logger or groups.is_logged:
            groups.measure("clipped_fraction", factor < 1.0)


def _factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor | float:
    """Return min(1, max_norm / (norm + 1e-6)); as in torch, an infinite norm gives 0 or NaN and is not hidden."""
    if norm.device.type == "cpu" and norm.dtype == torch.float32:
        # Python's arithmetic costs a tenth here, and a factor of 1 nothing; rounded to the same numbers as on a device
        quotient = _single(_single(1.0 / _single(norm.item() + _single(1e-6))) * _single(max_norm))
        return 1.0 if quotient > 1.0 else quotient
    return (norm + 1e-6).reciprocal_().mul_(max_norm).clamp_(max=1.0)


def _single(number: float) -> float:
    """Return a number rounded to 32 bits."""
    return c_float(number).value


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"clip_grad_norm": ClipGradNorm}
