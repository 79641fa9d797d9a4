"""Clipping each unit's gradient by the size of the unit's weights."""

import torch

from metaopt import Groups, Wrapper, hookimpl, hyper


class AdaptiveGradClip(Wrapper):
    """g_i <- g_i min(1, clipping max(|w_i|, eps) / |g_i|) for each row i; a vector is one row. arXiv:2102.06171

    Rows are what one output unit has: an index of the first dimension of a matrix or of a convolution (torch's
    transposed convolutions have their inputs there). `clipping=inf` in a group leaves it alone, which the paper advises
    for the last layer.
    """

    known_as = ("AGC", "agc", "adaptive_clip_grad", "unitwise clipping")
    clips_gradients = True

    clipping: float = hyper(0.01, gt=0.0, doc="the largest |g| / |w| of a row", known_as=("clip_factor",))
    eps: float = hyper(1e-3, ge=0.0, doc="the smallest size that weights count as; zeros could not move otherwise")

    def on_gradients(self, groups: Groups) -> None:
        for group in groups:
            bounds = group.rows_of(group.params).norms().clamp(min=group.eps) * group.clipping
            gradients = group.rows_of(group.grads)
            sizes = gradients.norms()
            # where a row's gradient is zero the factor does not matter, but 0 / 0 would
            gradients.multiply(torch.where(sizes > bounds, bounds / sizes, 1.0))


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"adaptive_grad_clip": AdaptiveGradClip}
