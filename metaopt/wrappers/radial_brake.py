"""Weights that grow more slowly than the base would have them grow."""

import torch

from metaopt import Group, Wrapper, hookimpl, hyper


class RadialBrake(Wrapper):
    """u <- x - w, x = w + t + s c w scaled to the length |w + s c w|, for each tensor's u = t + c w.

    t is at right angles to w; s = outward if c > 0, otherwise inward. The scaling undoes the growth from steps along
    tangents. It is the radial brake of modded-nanogpt's pull request 294, and with outward=inward=0 near AdamP
    (arXiv:2006.08217). Tensors of zeros have no radius and move as the base moves them.
    """

    known_as = ("radial dampening", "RadialBrakeHook", "AdamP", "RADIAL_OUTWARD_SCALE")

    outward: float = hyper(0.5, ge=0.0, le=1.0, doc="the share of a growth that stays", known_as=("outward_scale",))
    inward: float = hyper(1.0, ge=0.0, le=1.0, doc="the share of a shrinkage that stays", known_as=("inward_scale",))

    def on_update(self, group: Group) -> None:
        squares, mixed, whole = _products(group)
        radials = torch.where(squares > 0, mixed / squares, 0.0)
        damped = torch.where(radials > 0, radials * group.outward, radials * group.inward)
        radii = squares.sqrt() * (1 + damped).abs()
        # the length of w + u after the damping, from its two legs
        lengths = torch.hypot(radii, (whole - mixed * radials).clamp(min=0.0).sqrt())
        factors = torch.where((squares > 0) & (lengths > 0), radii / lengths, 1.0)
        torch._foreach_mul_(group.update, factors.unbind())
        torch._foreach_addcmul_(group.update, group.params, (factors * (1 + damped - radials) - 1).unbind())


def _products(group: Group) -> list[torch.Tensor]:
    """Return the means of |w|^2, of w u and of |u|^2 for each tensor, in the update's dtype."""
    found = [_inner(w.to(u.dtype).flatten(), u.flatten()) for w, u in zip(group.params, group.update, strict=True)]
    return [torch.stack(group.means(list(each))).real for each in zip(*found, strict=True)]


def _inner(w: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.vdot(w, w), torch.vdot(w, u), torch.vdot(u, u)


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"radial_brake": RadialBrake}
