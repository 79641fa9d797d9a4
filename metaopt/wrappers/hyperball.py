"""Matrices of constant size, turned by constant angles."""

import math

import torch
from torch import Tensor

from metaopt import Group, Wrapper, elementwise, hookimpl


def _turn(update: Tensor, param: Tensor, *, lr: float) -> dict[str, Tensor]:
    square, mixed, length = torch.dot(param, param), torch.dot(param, update), torch.dot(update, update)
    radius, size = torch.sqrt(square), torch.sqrt(length)
    cosine = mixed / radius / size
    shrink = torch.reciprocal(torch.sqrt(torch.clamp((1 + lr * lr) + cosine * (2 * lr), min=1e-12)))
    turning = torch.abs(cosine) < math.inf
    scale = torch.where(turning, shrink * lr * (radius / size), 1.0)
    return {"update": torch.addcmul(update * scale, param, torch.where(turning, shrink - 1, 0.0))}


class Hyperball(Wrapper):
    """w <- R N(w + lr R N(u)), N(x) = x / |x|, R = |w|, for each tensor with two dimensions or more. arXiv:2606.16899

    u is the base's update, of which only the direction counts; the base's lr is the relative length of a step, and 0.01
    to 0.02 are usual. R is the norm before the update and so the initial one, as long as no other part moves the
    weights. Vectors stay as the base updates them, and so do matrices of zeros, which have no size to keep.
    """

    known_as = ("MuonH", "AdamH", "HyperBallAdamW", "MuonHyperball", "hyperball optimization")

    turn = elementwise(_turn)

    def on_update(self, group: Group) -> None:
        for matrices in group.matrices():
            _turn_by_hand(matrices)

    def update_rules(self, group: Group) -> None:
        for matrices in group.matrices():
            self.turn(matrices)


def _turn_by_hand(group: Group) -> None:
    weights, updates = group.params, group.update
    squares, mixed, lengths = (
        group.stack(group.dots(*pair)) for pair in ((weights, weights), (weights, updates), (updates, updates))
    )
    radii, sizes = squares.sqrt(), lengths.sqrt()
    cosines = mixed / radii / sizes
    # R / |w + lr R N(u)|, from two sides and their angle: the sum of so many squares is less exact in 32 bits
    shrinks = (1 + 2 * group.base_lr * cosines + group.base_lr**2).clamp(min=1e-12).rsqrt()
    turning = cosines.isfinite()
    scales = torch.where(turning, shrinks * group.base_lr * (radii / sizes), 1.0)
    shifts = torch.where(turning, shrinks - 1, 0.0)
    group.multiply(updates, scales)
    group.add_multiples(updates, weights, shifts)


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"hyperball": Hyperball}
