"""OrthoGrad: no gradient along the weights."""

import torch

from metaopt import Group, Groups, Wrapper, hookimpl


class Orthograd(Wrapper):
    """a = g - (w g / (w w + 1e-30)) w; g <- a |g| / (|a| + 1e-30) for each tensor, so that w g = 0. arXiv:2501.04697

    What rounding leaves of a gradient along the weights counts as zero: a tensor of one element stays where it is.
    Weights that are all zero have no direction, and keep their gradient.
    """

    known_as = ("OrthoGrad", "⊥Grad", "orthogonal gradient")

    def on_gradients(self, groups: Groups) -> None:
        for group in groups:
            # 32 bits or more: products of small numbers are zero in 16
            weights, gradients = _wide(group.params), _wide(group.grads)
            sizes = group.norms(gradients)
            shares = _shares(group, weights, gradients)
            torch._foreach_sub_(gradients, torch._foreach_mul(weights, shares))
            stretches = [_stretch(*each) for each in zip(sizes, group.norms(gradients), gradients, strict=True)]
            torch._foreach_mul_(gradients, stretches)
            torch._foreach_copy_(group.grads, gradients)


def _wide(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors with components of at least 32 bits; those that have them are not copied."""
    wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return [torch.view_as_real(t) if t.is_complex() else t for t in wide]


def _shares(group: Group, weights: list[torch.Tensor], gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return w g / w w of each tensor: means over one number of elements are as good as sums."""
    along = group.means(list(torch._foreach_mul(weights, gradients)))
    squares = group.means(list(torch._foreach_mul(weights, weights)))
    return [(a / (s + 1e-30)).to(w.dtype) for a, s, w in zip(along, squares, weights, strict=True)]


def _stretch(size: torch.Tensor, left: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    noise = 4 * torch.finfo(gradient.dtype).eps * size
    return torch.where(left > noise, size / (left + 1e-30), 0.0).to(gradient.dtype)


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"orthograd": Orthograd}
