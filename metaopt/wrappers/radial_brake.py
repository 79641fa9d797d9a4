"""Weights that grow more slowly than the base would have them grow."""

import torch
from torch import Tensor

from metaopt import Group, Wrapper, elementwise, hookimpl, hyper


def _brake(update: Tensor, param: Tensor, *, outward: float, inward: float) -> dict[str, Tensor]:
    square, mixed, whole = torch.dot(param, param), torch.dot(param, update), torch.dot(update, update)
    radial = torch.where(square > 0, mixed / square, 0.0)
    damped = torch.where(radial > 0, radial * outward, radial * inward)
    radius = torch.sqrt(square) * torch.abs(1 + damped)
    length = torch.hypot(radius, torch.sqrt(torch.clamp(whole - mixed * radial, min=0.0)))
    factor = torch.where((square > 0) & (length > 0), radius / length, 1.0)
    return {"update": torch.addcmul(update * factor, param, factor * (1 + damped - radial) - 1)}


class RadialBrake(Wrapper):
    """u <- x - w, x = w + t + s c w scaled to the length |w + s c w|, for each tensor's u = t + c w.

    t is at right angles to w; s = outward if c > 0, otherwise inward. The scaling undoes the growth from steps along
    tangents. It is the radial brake of modded-nanogpt's pull request 294, and with outward=inward=0 near AdamP
    (arXiv:2006.08217). Tensors of zeros have no radius and move as the base moves them.
    """

    known_as = ("radial dampening", "RadialBrakeHook", "AdamP", "RADIAL_OUTWARD_SCALE")

    outward: float = hyper(0.5, ge=0.0, le=1.0, doc="the share of a growth that stays", known_as=("outward_scale",))
    inward: float = hyper(1.0, ge=0.0, le=1.0, doc="the share of a shrinkage that stays", known_as=("inward_scale",))

    brake = elementwise(_brake)

    def on_update(self, group: Group) -> None:
        weights, updates = group.params, group.update
        squares, mixed, whole = (
            group.stack(group.dots(*pair)) for pair in ((weights, weights), (weights, updates), (updates, updates))
        )
        radials = torch.where(squares > 0, mixed / squares, 0.0)
        damped = torch.where(radials > 0, radials * group.outward, radials * group.inward)
        radii = squares.sqrt() * (1 + damped).abs()
        # the length of w + u after the damping, from its two legs
        lengths = torch.hypot(radii, (whole - mixed * radials).clamp(min=0.0).sqrt())
        factors = torch.where((squares > 0) & (lengths > 0), radii / lengths, 1.0)
        group.multiply(updates, factors)
        group.add_multiples(updates, weights, factors * (1 + damped - radials) - 1)

    def update_rules(self, group: Group) -> None:
        self.brake(group)


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"radial_brake": RadialBrake}
