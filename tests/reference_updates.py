"""The rules of the parts that act on the update, from their papers, on plain tensors: knows nothing of metaopt.

`w` are the weights before the update, `u` is what the base is about to add to them, `g` the gradient, `lr` the rate
that is already inside `u`. Every rule returns the new `u`; those of several tensors at once return a list.
"""

import math

import torch

Tensor = torch.Tensor


def cautious(w: Tensor, u: Tensor, g: Tensor, *, lr: float, maximize: bool = False) -> Tensor:
    """arXiv:2411.16085, algorithm 1: a mask where the step goes down the gradient, over its mean."""
    if not u.numel():
        return u
    down = _inner(u, g) > 0 if maximize else _inner(u, g) < 0
    return u * down / down.double().mean().clamp(min=1e-3)


def cautious_decay(w: Tensor, u: Tensor, g: Tensor, *, lr: float, weight_decay: float) -> Tensor:
    """arXiv:2510.12402, algorithm 1: x <- x - lr (u + weight_decay I(u x >= 0) x), with u = -(what is added) / lr."""
    step = -u / lr
    agree = _inner(step, w) >= 0
    return -lr * (step + weight_decay * torch.where(agree, w, 0.0))


def hyperball(w: Tensor, u: Tensor, g: Tensor, *, lr: float) -> Tensor:
    """arXiv:2606.16899: W <- R N(W - lr R N(u)), R = |W|, N(x) = x / |x|, for matrices alone."""
    radius = w.norm()
    if w.dim() < 2 or not radius or not u.norm():
        return u
    moved = w + lr * radius * u / u.norm()
    return radius * moved / moved.norm() - w


def update_floor(w: Tensor, u: Tensor, g: Tensor, *, lr: float, floor: float, rows: bool = False) -> Tensor:
    """modded-nanogpt's u/w floor, of each tensor (pull request 274) or of each row (328)."""
    if rows and w.dim() > 1:
        found = [update_floor(*each, lr=lr, floor=floor) for each in zip(w, u, g, strict=True)]
        return torch.stack(found) if found else u
    step = u / lr
    if 0 < step.norm() < floor * w.norm():
        return u * (floor * w.norm() / step.norm())
    return u


def radial_brake(w: Tensor, u: Tensor, g: Tensor, *, lr: float, outward: float = 0.5, inward: float = 1.0) -> Tensor:
    """modded-nanogpt's pull request 294: damp the radial part, then undo the drift of the tangential one."""
    if not w.norm():
        return u
    direction = w / w.norm()
    length = _inner(u, direction).sum()
    tangential = u - length * direction
    length = length * (outward if length > 0 else inward)
    end = w + tangential + length * direction
    radius = (w.norm() + length).abs()
    return radius * end / end.norm() - w if end.norm() else -w


def trust_ratio(
    w: Tensor,
    u: Tensor,
    g: Tensor,
    *,
    lr: float,
    trust_coefficient: float = 1.0,
    eps: float = 0.0,
    min_norm: float = 0.0,
    max_ratio: float = math.inf,
) -> Tensor:
    """arXiv:1904.00962 (and arXiv:1708.03888 where `u` is a bare gradient's): u |w| / |u|, 1 for a norm of zero."""
    step = u / lr
    size, length = max(float(w.norm()), min_norm), max(float(step.norm()), min_norm)
    ratio = trust_coefficient * size / (length + eps) if size and length else 1.0
    return u * min(ratio, max_ratio)


def clip_update_rms(w: Tensor, u: Tensor, g: Tensor, *, lr: float, max_rms: float) -> Tensor:
    """arXiv:1804.04235, section 6: u / max(1, RMS(u) / d)."""
    if not u.numel():
        return u
    return u / max(1.0, float((u / lr).abs().square().mean().sqrt()) / max_rms)


def clip_update_norm(updates: list[Tensor], *, max_norm: float) -> list[Tensor]:
    """The rule of arXiv:1211.5063, on what the base adds to the weights in place of the gradients."""
    norm = math.sqrt(sum(float(u.abs().square().sum()) for u in updates))
    return [u * (max_norm / norm) for u in updates] if norm > max_norm else updates


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of each two components; of complex ones, the inner product of their arrows."""
    return a.real * b.real + a.imag * b.imag if a.is_complex() else a * b
