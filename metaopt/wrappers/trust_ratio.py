"""Updates as large beside the weights of their tensor as those of every other tensor."""

import math

import torch
from torch import Tensor

from metaopt import Group, Wrapper, elementwise, hookimpl, hyper


def _rescale(
    update: Tensor, param: Tensor, *, lr: float, trust_coefficient: float, eps: float, min_norm: float, max_ratio: float
) -> dict[str, Tensor]:
    size = torch.clamp(torch.norm(param), min=min_norm)
    length = torch.clamp(torch.norm(update), min=lr * min_norm)
    ratio = trust_coefficient * lr * size / (length + lr * eps)
    ratio = torch.where((size > 0) & (length > 0), ratio, 1.0)
    return {"update": update * torch.where(ratio > max_ratio, max_ratio, ratio)}


class TrustRatio(Wrapper):
    """u <- u min(trust_coefficient |w| / (|u| / lr + eps), max_ratio) for each tensor. arXiv:1904.00962

    |u| / lr is the size of the base's update at rate 1, a decay of the weights inside it included. Over Adam it is
    LAMB; over SGD without momentum, with trust_coefficient=0.001, it is LARS (arXiv:1708.03888). Both norms count as at
    least `min_norm`; if one of them is zero, the update stays.
    """

    known_as = ("LAMB", "LARS", "scale_by_trust_ratio", "layerwise adaptation")

    trust_coefficient: float = hyper(1.0, ge=0.0, doc="the ratio at equal norms", known_as=("trust_coeff", "eta"))
    eps: float = hyper(0.0, ge=0.0, doc="added to the size of the update")
    min_norm: float = hyper(0.0, ge=0.0, doc="what both norms count as at least")
    max_ratio: float = hyper(math.inf, gt=0.0, doc="the largest ratio; 1 only shrinks", known_as=("trust_clip",))

    rescale = elementwise(_rescale)

    def on_update(self, group: Group) -> None:
        lr = group.base_lr
        sizes = group.stack(group.norms(group.params)).clamp(min=group.min_norm)
        # everything times lr: a rate of zero divides nothing
        lengths = group.stack(group.norms(group.update)).clamp(min=lr * group.min_norm)
        ratios = group.trust_coefficient * lr * sizes / (lengths + lr * group.eps)
        ratios = torch.where((sizes > 0) & (lengths > 0), ratios, 1.0).clamp(max=group.max_ratio)
        group.multiply(group.update, ratios)

    def update_rules(self, group: Group) -> None:
        self.rescale(group)


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"trust_ratio": TrustRatio}
