"""Tensors of which this process may hold only a shard: local parts, and norms, means and noise over all shards."""

import functools
import hashlib
import math
import sys
from typing import Any

import torch

from metaopt import flat_memory, multi_tensor
from metaopt.multi_tensor import at_least_float32

# elements from which on a tensor's norm is taken by rows, and how many rows
LARGE = 1 << 16
ROWS = 64
# so many tensors of at most so many elements are copied into one, of at most LARGE elements, before their norm is taken
MANY = 64
SMALL = 1 << 10

PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


def _dtensor_module() -> Any:
    # a DTensor can only exist once its module was imported; importing it here would cost everyone half a second
    return sys.modules.get("torch.distributed.tensor")


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a DTensor."""
    if type(tensor) in PLAIN:
        return False
    module = _dtensor_module()
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process holds: a DTensor's shard, any other tensor itself."""
    if type(tensor) in PLAIN:  # most are, and are asked for several times in an update
        return tensor
    part: torch.Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def all_local(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the parts of tensors that this process holds."""
    return tensors if PLAIN.issuperset(map(type, tensors)) else [local(tensor) for tensor in tensors]


def dense(gradient: torch.Tensor) -> torch.Tensor:
    """Return the values of a gradient: a coalesced sparse one's stored values, a dense one itself."""
    return gradient._values() if gradient.is_sparse else gradient


def like_parameter(parameter: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return local values as a tensor like their parameter: a DTensor if it is one, in its dtype."""
    return placed_like(parameter, values if values.dtype == parameter.dtype else values.to(parameter.dtype))


def placed_like(parameter: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return local values as a DTensor placed as their parameter, if that is one; otherwise themselves."""
    if not is_sharded(parameter):
        return values
    sharded: Any = parameter
    wrapped: torch.Tensor = _dtensor_module().DTensor.from_local(
        values, sharded.device_mesh, sharded.placements, shape=sharded.shape, stride=sharded.stride()
    )
    return wrapped


# ---- of one tensor


def norm_over_shards(values: torch.Tensor, parameter: torch.Tensor, *, rows: bool) -> torch.Tensor:
    """Return the 2-norm of `values`, a local part of something like `parameter`, over all shards; at least float32.

    With `rows` one norm for each index of the first dimension, kept in shape; a vector counts as one row.
    """
    norm: torch.Tensor = torch.linalg.vector_norm(
        values, dim=_summed(values, rows), keepdim=rows, dtype=at_least_float32(values.dtype)
    )
    if not is_sharded(parameter):
        return norm
    return sum_over_shards(norm.square(), parameter, rows=rows).sqrt()


def norms_over_shards(values: list[torch.Tensor], parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the 2-norm of each of many local parts over all its shards; see `sums_over_shards`."""
    norms = multi_tensor.norms(values)
    if not any(map(is_sharded, parameters)):
        return norms
    return [total.sqrt() for total in sums_over_shards([norm.square() for norm in norms], parameters)]


def sums_over_shards(sums: list[torch.Tensor], parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return local sums of one shape plus those of other shards, with one reduction for all that are split alike."""
    kinds: dict[Any, list[int]] = {}
    for i, parameter in enumerate(parameters):
        if is_sharded(parameter):
            sharded: Any = parameter
            split = tuple(placement.is_shard() for placement in sharded.placements)
            kinds.setdefault((sharded.device_mesh, split), []).append(i)
    totals = list(sums)
    for members in kinds.values():
        whole = sum_over_shards(torch.stack([sums[i] for i in members]), parameters[members[0]])
        for i, total in zip(members, whole.unbind(), strict=True):
            totals[i] = total
    return totals


def mean_over_shards(values: torch.Tensor, parameter: torch.Tensor, *, rows: bool) -> torch.Tensor:
    """Return the mean of `values`, a local part of something like `parameter`, over all shards; `rows` as there."""
    count = parameter.numel()
    if rows and parameter.dim() > 1:
        count //= max(1, parameter.shape[0])
    dims, wide = _summed(values, rows), at_least_float32(values.dtype)
    total = values.sum(dim=dims, keepdim=rows, dtype=wide) if dims else values.to(wide)
    return sum_over_shards(total, parameter, rows=rows) / max(1, count)


def means_over_shards(values: list[torch.Tensor], parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the mean of each of many local parts over all its shards."""
    if not multi_tensor.on_accelerator(values) or any(map(is_sharded, parameters)):
        return [mean_over_shards(v, p, rows=False) for v, p in zip(values, parameters, strict=True)]
    return list(torch._foreach_div(flat_memory.sums(values), [float(max(1, p.numel())) for p in parameters]))


def dots_over_shards(
    a: list[torch.Tensor], b: list[torch.Tensor], parameters: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Return the real inner product of each two local parts over all shards, as `sums_over_shards` does; >= float32."""
    if multi_tensor.on_accelerator(a):
        return sums_over_shards(flat_memory.dots(a, b), parameters)
    return sums_over_shards([_dot(x, y) for x, y in zip(a, b, strict=True)], parameters)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    wide = at_least_float32(torch.promote_types(a.dtype, b.dtype))
    product = torch.vdot(a.reshape(-1).to(wide), b.reshape(-1).to(wide))
    return product.real if wide.is_complex else product


def sum_over_shards(sums: torch.Tensor, parameter: torch.Tensor, *, rows: bool = False) -> torch.Tensor:
    """Return local sums plus those of the other shards; a sum per row is whole already if the shards are rows."""
    if not is_sharded(parameter):
        return sums
    module, sharded = _dtensor_module(), parameter
    by_row = rows and parameter.dim() > 1
    partial = [p.is_shard() and not (by_row and p.is_shard(0)) for p in sharded.placements]  # type: ignore[attr-defined]
    placed = module.DTensor.from_local(
        sums,
        sharded.device_mesh,  # type: ignore[attr-defined]
        # a row's own shards are left out of the sum: each process keeps its rows
        [module.Partial() if is_partial else module.Replicate() for is_partial in partial],
        run_check=False,
    )
    added: torch.Tensor = placed.full_tensor()
    return added


def _summed(values: torch.Tensor, rows: bool) -> list[int]:
    return list(range(1 if rows and values.dim() > 1 else 0, values.dim()))


# ---- of many tensors together


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
    module = _dtensor_module()
    for tensor in tensors:
        if module is not None and isinstance(tensor, module.DTensor):
            tensor = _without_partial(tensor, module)
            split = tuple(placement.is_shard() for placement in tensor.placements)
            meshes.setdefault((tensor.device_mesh, split), []).append(tensor)
        else:
            plain.append(tensor)
    if not meshes:
        return _norm_here(plain, norm_type)
    parts = [_norm_over_mesh(members, mesh, split, norm_type, module) for (mesh, split), members in meshes.items()]
    if plain:
        parts.append(_norm_here(plain, norm_type).to(parts[0].device))
    if len(parts) == 1:
        return parts[0]
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack([p.to(parts[0].device) for p in parts]), norm_type)
    return norm


def _norm_here(tensors: list[torch.Tensor], p: float) -> torch.Tensor:
    if not tensors:
        return torch.nn.utils.get_total_norm(tensors, p)
    first, kinds = tensors[0], dict.fromkeys((t.dtype, t.device) for t in tensors)
    if len(kinds) == 1:
        return _norm_of_uniform(tensors, p)
    # of each device first: torch would send the norm of each tensor over by itself
    parts = [_norm_of_uniform([t for t in tensors if (t.dtype, t.device) == kind], p) for kind in kinds]
    wide = functools.reduce(torch.promote_types, (part.dtype for part in parts))
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack([n.to(first.device, wide) for n in parts]), p)
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
    own = _norm_here(parts, p).to(first.device) if parts else first.new_zeros(())
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


def total_dot(a: list[torch.Tensor], b: list[torch.Tensor], parameters: list[torch.Tensor]) -> torch.Tensor:
    """Return the real inner product of two aligned lists of local tensors, over all shards, as one 0-dim tensor."""
    return multi_tensor.stacked(dots_over_shards(a, b, parameters)).sum()


def holders_of_other_shards(parameter: torch.Tensor) -> set[int]:
    """Return the ranks that hold other shards of a parameter than this process does."""
    if not is_sharded(parameter):
        return set()
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    own = mesh.get_coordinate()
    if own is None:
        return set()
    alike = mesh.mesh
    for dim, (place, here) in enumerate(zip(placements, own, strict=True)):
        if place.is_shard():
            alike = alike.narrow(dim, here, 1)
    return {*mesh.mesh.flatten().tolist()} - {*alike.flatten().tolist()}


# ---- noise


def random_like(values: torch.Tensor, parameter: torch.Tensor, key: str, distribution: str) -> torch.Tensor:
    """Return noise like `values`, a function of `key` and the whole shape: each shard gets its part of the same noise.

    `values` is shaped like this process's part of `parameter`, or has another shape of its own, the same everywhere.
    """
    whole = parameter.shape if values.shape == local(parameter).shape else values.shape
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1
    generator = torch.Generator(values.device).manual_seed(seed)
    # drawn in one dtype, so that the stream does not depend on that of the weights; float64 keeps its own digits
    dtype = at_least_float32(values.dtype)
    draw = torch.rand if distribution == "uniform" else torch.randn
    noise = draw(tuple(whole), dtype=dtype, device=values.device, generator=generator)
    if is_sharded(parameter) and whole == parameter.shape:
        noise = _own_part(noise, parameter)
    return noise.to(values.dtype)


def _own_part(whole: torch.Tensor, parameter: Any) -> torch.Tensor:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    for dim, (size, start) in enumerate(zip(shape, offset, strict=True)):
        whole = whole.narrow(dim, min(start, whole.shape[dim]), size)
    return whole
