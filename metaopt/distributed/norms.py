"""The norm over all elements of many tensors: plain ones, shards over their meshes, many small ones at a time."""

import functools
import math
from typing import Any

import torch

from metaopt import multi_tensor
from metaopt.distributed.shards import dtensor_module, splits

# elements from which on a tensor's norm is taken by rows, and how many rows
LARGE = 1 << 16
ROWS = 64
# so many tensors of at most so many elements are copied into one, of at most LARGE elements, before their norm is taken
MANY = 64
SMALL = 1 << 10


def total_norm(tensors: list[torch.Tensor], norm_type: float = 2.0, *, uniform: bool = False) -> torch.Tensor:
    """Return the p-norm over all elements of all tensors, as one 0-dim tensor that every rank agrees on.

    |g| = (sum_i |g_i|^p)^(1/p), with one reduction for each device mesh and each way to split over it, two if p is
    infinite; tensors that are not DTensors count once. Each mesh is added up in float32, in float64 if one of its
    tensors has it. `uniform`: the caller knows that they are plain tensors of one dtype and device.
    """
    if math.isinf(norm_type):  # which has no value over no elements
        tensors = [tensor for tensor in tensors if tensor.numel()]
    if uniform:
        return _norm_of_uniform(tensors, norm_type)
    plain: list[torch.Tensor] = []
    # tensors of one mesh that are split over the same of its dimensions are reduced together
    meshes: dict[tuple[Any, tuple[bool, ...]], list[Any]] = {}
    module = dtensor_module()
    for tensor in tensors:
        if module is not None and isinstance(tensor, module.DTensor):
            tensor = _without_partial(tensor, module)
            split = tuple(map(splits, tensor.placements))
            meshes.setdefault((tensor.device_mesh, split), []).append(tensor)
        else:
            plain.append(tensor)
    if not meshes:
        return _norm_of_rank(plain, norm_type)
    parts = [_norm_over_mesh(members, mesh, split, norm_type, module) for (mesh, split), members in meshes.items()]
    if plain:
        parts.append(_norm_of_rank(plain, norm_type).to(parts[0].device))
    if len(parts) == 1:
        return parts[0]
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack([p.to(parts[0].device) for p in parts]), norm_type)
    return norm


def _norm_of_rank(tensors: list[torch.Tensor], p: float) -> torch.Tensor:
    """Return the norm over local tensors, of each device first, then of these on the first one; any dtypes."""
    kinds = dict.fromkeys((t.dtype, t.device) for t in tensors)
    if len(kinds) <= 1:
        return _norm_of_uniform(tensors, p)
    # of each device first: torch would send the norm of each tensor over by itself
    parts = [_norm_of_uniform([t for t in tensors if (t.dtype, t.device) == kind], p) for kind in kinds]
    wide = functools.reduce(torch.promote_types, (part.dtype for part in parts))
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack([n.to(tensors[0].device, wide) for n in parts]), p)
    return total


def _norm_of_uniform(tensors: list[torch.Tensor], p: float) -> torch.Tensor:
    """Return the norm over tensors of one dtype and device: what torch's function does without sorting by them."""
    if not tensors:
        return torch.nn.utils.get_total_norm(tensors, p)
    first = tensors[0]
    if p == math.inf and first.device.type == "cpu" and first.is_floating_point():
        # the same number as torch's own infinity norm, in a ninth of its time on a processor
        extremes = [extreme for tensor in tensors for extreme in torch.aminmax(tensor)]
        return torch.stack(extremes).abs().amax()
    norms: list[torch.Tensor] = []
    if first.is_cpu and first.dtype in (torch.float32, torch.float64):
        norms, tensors = _norms_of_small(tensors, p)
    by_rows = [t.numel() >= LARGE and _has_rows(t) for t in tensors]
    others = tensors
    if any(by_rows):
        others = [t for t, by in zip(tensors, by_rows, strict=True) if not by]
        large = [t for t, by in zip(tensors, by_rows, strict=True) if by]
        norms += [torch.linalg.vector_norm(t.view(ROWS, -1), p, dim=1) for t in large]
    if others:
        # 16 bits have no norm beyond 65504, or one of three digits
        dtype = torch.float32 if first.dtype in (torch.float16, torch.bfloat16) else None
        norms.append(multi_tensor.stacked(torch._foreach_norm(others, p, dtype)))
    norm: torch.Tensor = torch.linalg.vector_norm(torch.cat(norms) if len(norms) > 1 else norms[0], p)
    return norm


def _norms_of_small(tensors: list[torch.Tensor], p: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return norms over many small tensors at a time, and the tensors that are not among them.

    A processor takes longer to begin with a small tensor than for its elements, and a copy of it is less work than its
    norm. So many elements are added up in 64 bits: in 32 the sum would have fewer right digits than norms one by one.
    """
    if len(tensors) < MANY or p not in (1.0, 2.0):  # other powers of 64 bits take long
        return [], tensors
    sizes = list(map(torch.Tensor.numel, tensors))
    small, others = tensors, list[torch.Tensor]()
    if max(sizes) > SMALL:
        small = [t for t, size in zip(tensors, sizes, strict=True) if size <= SMALL]
        others = [t for t, size in zip(tensors, sizes, strict=True) if size > SMALL]
        sizes = [size for size in sizes if size <= SMALL]
    if len(small) < MANY:
        return [], tensors
    step = LARGE // max(1, *sizes)
    parts = [small[begin : begin + step] for begin in range(0, len(small), step)]
    norms = [torch.linalg.vector_norm(_joined(part), p, dtype=torch.float64) for part in parts]
    return [torch.stack(norms).to(tensors[0].dtype)], others


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the elements of tensors as one vector."""
    if set(map(torch.Tensor.dim, tensors)) == {1}:
        return torch.cat(tensors)
    joined: torch.Tensor = torch._utils._flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    return joined


def _has_rows(tensor: torch.Tensor) -> bool:
    """Return whether the norm of a large tensor is better taken over rows first.

    A processor reduces a whole tensor with one of its threads, rows with all of them; and the sum of so many squares
    in 32 bits is wrong from the fifth digit on.
    """
    return (
        tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.float64)
        and tensor.numel() % ROWS == 0
        and tensor.is_contiguous()
    )


def _norm_over_mesh(members: list[Any], mesh: Any, split: tuple[bool, ...], p: float, module: Any) -> torch.Tensor:
    # a rank can have an empty shard, whose infinity norm is undefined; all ranks must still take part in the reduction
    parts = [part for member in members if (part := member.to_local()).numel()]
    first = members[0].to_local()
    own = _norm_of_rank(parts, p).to(first.device) if parts else first.new_zeros(())
    # of all members, whichever of them this rank has something of: the ranks reduce numbers of one dtype
    own = own.to(functools.reduce(torch.promote_types, (m.dtype.to_real() for m in members), torch.float32))
    if not math.isinf(p):
        return _reduced(own**p, "sum", mesh, split, module) ** (1.0 / p)
    # a maximum over ranks may pass a NaN over, a sum does not
    lost = torch.where(own.isnan(), own, torch.zeros_like(own))
    return _reduced(own, "max", mesh, split, module) + _reduced(lost, "sum", mesh, split, module)


def _reduced(own: torch.Tensor, how: str, mesh: Any, split: tuple[bool, ...], module: Any) -> torch.Tensor:
    """Reduce one number of each rank over the dimensions of the mesh that split the tensors."""
    placements = [module.Partial(how) if cut else module.Replicate() for cut in split]
    whole: torch.Tensor = module.DTensor.from_local(own, mesh, placements).full_tensor()
    return whole


def _without_partial(tensor: Any, module: Any) -> Any:
    """Reduce partial placements first: norms of partial sums cannot be added."""
    if not any(placement.is_partial() for placement in tensor.placements):
        return tensor
    done = [module.Replicate() if placement.is_partial() else placement for placement in tensor.placements]
    return tensor.redistribute(placements=done)
