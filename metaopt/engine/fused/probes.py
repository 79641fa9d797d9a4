"""Which of torch's fused kernels are right on a device: known of processors and CUDA, tried out once on any other."""

from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch.optim import SGD, Adagrad, Adam, AdamW
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from metaopt.distributed.shards import is_sharded
from metaopt.torch_internals import without_step_hooks

Kind = Any  # an optimizer class; mypy takes those for unhashable

# where torch's own tests run its kernels, with and without a factor of the gradients
KNOWN_DEVICES = frozenset({"cpu", "cuda"})
# settings by which a class takes another kernel
VARIANTS: dict[Kind, tuple[dict[str, Any], ...]] = {
    Adam: ({}, {"amsgrad": True}),
    AdamW: ({}, {"amsgrad": True}),
    SGD: ({}, {"momentum": 0.9}),
}
# two updates: the first one of Adam is the same for all multiples of a gradient
GRADIENTS = (1.0, -2.0, 4.0), (3.0, 0.5, -1.0)
FACTORS = 2.0, 8.0


def has_fused_kernel(kind: Kind, params: Sequence[torch.Tensor]) -> bool:
    """Return whether torch's `kind(..., fused=True)` updates all of these parameters, and rightly.

    What torch 2.13 lacks: kernels for complex and sparse parameters, sharding rules for SGD and Adagrad, Adagrad off
    the CPU; SGD leaves vectors of 16-bit parameters unmoved on a CPU (pytorch#191763). A test asks torch again. Its
    list of devices says nothing of their kernels, so that those of other devices are tried.
    """
    devices = _get_fused_kernels_supported_devices()
    if kind not in (SGD, Adagrad, Adam, AdamW):
        return False
    others = set()
    # one parameter of each kind: there may be thousands
    kinds = map(attrgetter("device", "dtype", "layout", "__class__"), params)
    for p in dict(zip(kinds, params, strict=True)).values():
        device = p.device.type
        if device not in devices or not p.is_floating_point() or p.is_sparse:
            return False
        if kind in (SGD, Adagrad) and is_sharded(p):
            return False
        if kind is Adagrad and device != "cpu":
            return False
        if kind is SGD and device == "cpu" and p.element_size() == 2:
            return False
        if device not in KNOWN_DEVICES:
            others.add((device, p.dtype))
    return all(updates_as_a_loop(kind, device, dtype) for device, dtype in others)


def takes_factor(kind: Kind, params: Sequence[torch.Tensor]) -> bool:
    """Return whether the fused kernel of a base divides the gradients of all of these parameters by `grad_scale`.

    Not if they are on devices of several types: torch copies the factor to the processor without waiting for it. And
    torch's kernels for Apple's GPUs ignore it before a torch of June 2026 (pytorch#186360), without an error.
    """
    if all(map(attrgetter("is_cuda"), params)):
        return True
    found = {(p.device.type, p.dtype) for p in params}
    if len({device for device, _ in found}) > 1:
        return False
    return all(device in KNOWN_DEVICES or divides_gradients(kind, device, dtype) for device, dtype in found)


@cache
def updates_as_a_loop(kind: Kind, device: str, dtype: torch.dtype) -> bool:
    """Try whether a class updates a tensor by its fused kernel as by its loop over tensors."""
    settings = VARIANTS.get(kind, ({},))
    return all(_agree(kind, device, dtype, {**s, "fused": True}, {**s, "foreach": False}) for s in settings)


@cache
def divides_gradients(kind: Kind, device: str, dtype: torch.dtype) -> bool:
    """Try whether a class's fused kernel divides by `grad_scale`, in the update and in the gradient that it leaves."""
    fused = [{**s, "fused": True} for s in VARIANTS.get(kind, ({},))]
    return all(_agree(kind, device, dtype, s, s, FACTORS) for s in fused)


def _agree(
    kind: Kind,
    device: str,
    dtype: torch.dtype,
    one: dict[str, Any],
    other: dict[str, Any],
    factors: tuple[float, ...] | None = None,
) -> bool:
    """Return whether two settings end alike; the first one gets gradients times `factors`, and these to divide by."""
    near = 1e-2 if dtype.itemsize == 2 else 1e-4
    try:
        ends = _updated(kind, device, dtype, one, factors), _updated(kind, device, dtype, other)
        return all(torch.allclose(a, b.to(a), rtol=near, atol=near) for a, b in zip(*ends, strict=True))
    except Exception:  # whatever a device or a class raises for what it cannot do
        return False


def _updated(
    kind: Kind, device: str, dtype: torch.dtype, settings: dict[str, Any], factors: tuple[float, ...] | None = None
) -> list[torch.Tensor]:
    """Return weights, gradient and state after an update by each of `GRADIENTS`."""
    weights = torch.ones(len(GRADIENTS[0]), dtype=dtype, device=device, requires_grad=True)
    base = kind([weights], lr=0.1, **settings)
    for number, gradient in enumerate(GRADIENTS):
        factor = 1.0 if factors is None else factors[number]
        weights.grad = torch.tensor(gradient, dtype=dtype, device=device) * factor
        if factors is not None:
            base.grad_scale = torch.tensor(factor, dtype=torch.float32, device=device)
        without_step_hooks(kind.step)(base)
    kept = [value for value in base.state[weights].values() if isinstance(value, torch.Tensor)]
    assert weights.grad is not None
    return [weights.detach(), weights.grad, *kept]
