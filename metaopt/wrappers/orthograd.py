"""OrthoGrad: no gradient along the weights."""

import torch

from metaopt import Example, Groups, Wrapper, hookimpl


class Orthograd(Wrapper):
    """a = g - (w g / (w w + 1e-30)) w; g <- a |g| / (|a| + 1e-30) for each tensor, so that w g = 0. arXiv:2501.04697

    What rounding leaves of a gradient along the weights counts as zero: a tensor of one element stays where it is.
    Weights that are all zero have no direction, and keep their gradient.
    """

    known_as = ("OrthoGrad", "⊥Grad", "orthogonal gradient")

    def on_gradients(self, groups: Groups) -> None:
        for group in groups:
            own = _components(group.grads)
            # 32 bits or more: products of small numbers are zero in 16
            wide = torch.promote_types(own[0].dtype, torch.float32)
            weights, gradients = (group.cast(each, wide) for each in (_components(group.params), own))
            sizes = group.stack(group.norms(gradients))
            along, squares = (group.stack(group.dots(weights, each)) for each in (gradients, weights))
            group.add_multiples(gradients, weights, -(along / (squares + 1e-30)))
            group.multiply(gradients, _stretch(sizes, group.stack(group.norms(gradients))))
            if own[0].dtype != wide:
                torch._foreach_copy_(own, gradients)


def _components(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors, complex ones as two real numbers each: views of the same memory."""
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]


def _stretch(size: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    noise = 4 * torch.finfo(left.dtype).eps * size
    return torch.where(left > noise, size / (left + 1e-30), 0.0)


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"orthograd": Orthograd}


@hookimpl
def metaopt_examples() -> dict[str, Example]:
    one_element = "a gradient of one element has no part across the weights, so by the rule it is zero"
    return {"orthograd": Example(expected_failures={"takes_every_shape": one_element})}
