"""Calls over lists of tensors, in one of two forms: here alone the device decides which.

On an accelerator each call costs a launch, so all tensors are taken by one. A processor has no launches: there it
counts that little memory is touched, and one tensor is done after the other. A list has one device and dtype.
"""

from collections.abc import Sequence

import torch

Tensors = list[torch.Tensor]


def on_accelerator(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether tensors are kept where each call costs a launch."""
    return bool(tensors) and not tensors[0].is_cpu


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which many numbers of this one are added up: 16 bits hold no sum beyond 65504."""
    return torch.promote_types(dtype, torch.float32)


def room_for(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> Tensors:
    """Return tensors of the same shapes, cut from one piece of new memory."""
    if not tensors:
        return []
    sizes = [t.numel() for t in tensors]
    memory = torch.empty(sum(sizes), dtype=dtype, device=tensors[0].device)
    return [piece.view(t.shape) for piece, t in zip(torch.split(memory, sizes), tensors, strict=True)]


def copies(tensors: Sequence[torch.Tensor], dtype: torch.dtype | None = None) -> Tensors:
    """Return copies, in another dtype if one is given."""
    if not on_accelerator(tensors):
        return [t.detach().to(dtype or t.dtype, copy=True) for t in tensors]
    made = room_for(tensors, dtype or tensors[0].dtype)
    torch._foreach_copy_(made, list(tensors))
    return made


def cast(tensors: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    """Return tensors in a dtype, float32 at least if none is given: the very same ones if they have it."""
    if not tensors:
        return tensors
    dtype = dtype or at_least_float32(tensors[0].dtype)
    return tensors if all(t.dtype == dtype for t in tensors) else copies(tensors, dtype)


def add_(tensors: Tensors, others: Tensors, alpha: float = 1.0) -> None:
    """Add other tensors in place; of two dtypes the sums are rounded once, to that of `tensors`."""
    if not on_accelerator(tensors) or tensors[0].dtype == others[0].dtype:
        torch._foreach_add_(tensors, others, alpha=alpha)
        return
    wide = torch.promote_types(tensors[0].dtype, others[0].dtype)
    sums = cast(tensors, wide)
    torch._foreach_add_(sums, cast(others, wide), alpha=alpha)
    if sums is not tensors:
        torch._foreach_copy_(tensors, sums)


def lerp_(starts: Tensors, ends: Tensors, weight: float) -> None:
    """Interpolate in place between tensors of two dtypes, which torch's own multi-tensor call refuses."""
    if on_accelerator(starts):
        torch._foreach_lerp_(starts, cast(ends, starts[0].dtype), weight)
        return
    for start, end in zip(starts, ends, strict=True):
        start.lerp_(end.to(start.dtype), weight)


def operand(number: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a 0-dim tensor as tensors are multiplied by it: on their device, and on an accelerator in their dtype.

    There torch would go through the tensors one by one for a number of another dtype.
    """
    if not on_accelerator(tensors):
        return number.to(tensors[0].device)
    dtype = tensors[0].dtype
    return number.to(tensors[0].device, dtype.to_real() if dtype.is_complex and not number.is_complex() else dtype)


def norms(tensors: Sequence[torch.Tensor]) -> Tensors:
    """Return the 2-norm of each tensor, in float32 at least."""
    if not on_accelerator(tensors):
        return [torch.linalg.vector_norm(t, dtype=at_least_float32(t.dtype)) for t in tensors]
    return list(torch._foreach_norm(list(tensors), 2, dtype=at_least_float32(tensors[0].dtype)))


def stacked(numbers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return 0-dim tensors as one tensor."""
    if not on_accelerator(numbers):
        return torch.stack(list(numbers))
    # torch joins at most 128 tensors by one launch
    room = torch.empty(len(numbers), dtype=numbers[0].dtype, device=numbers[0].device)
    torch._foreach_copy_(list(room.unbind()), list(numbers))
    return room
