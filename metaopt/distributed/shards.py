"""Tensors of which this process may hold only a shard: local parts, and norms, means and noise over all shards."""

import hashlib
import sys
from typing import Any

import torch

from metaopt import flat_memory, multi_tensor
from metaopt.multi_tensor import at_least_float32

PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


def dtensor_module() -> Any:
    """Return torch's module of DTensors, or None if nobody has imported it."""
    # a DTensor can only exist once its module was imported; importing it here would cost everyone half a second
    return sys.modules.get("torch.distributed.tensor")


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a DTensor."""
    if type(tensor) in PLAIN:
        return False
    module = dtensor_module()
    return module is not None and isinstance(tensor, module.DTensor)


def splits(placement: Any) -> bool:
    """Return whether a DTensor is split over the dimension of its mesh that has this placement.

    FSDP2 over tensor parallelism gives strided shards, of which `is_shard()` is false.
    """
    return not (placement.is_replicate() or placement.is_partial())


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
    wrapped: torch.Tensor = dtensor_module().DTensor.from_local(
        values, sharded.device_mesh, sharded.placements, shape=sharded.shape, stride=sharded.stride()
    )
    return wrapped


# ---- numbers over all shards


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
            split = tuple(map(splits, sharded.placements))
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


def total_dot(a: list[torch.Tensor], b: list[torch.Tensor], parameters: list[torch.Tensor]) -> torch.Tensor:
    """Return the real inner product of two aligned lists of local tensors, over all shards, as one 0-dim tensor."""
    return multi_tensor.stacked(dots_over_shards(a, b, parameters)).sum()


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    wide = at_least_float32(torch.promote_types(a.dtype, b.dtype))
    product = torch.vdot(a.reshape(-1).to(wide), b.reshape(-1).to(wide))
    return product.real if wide.is_complex else product


def sum_over_shards(sums: torch.Tensor, parameter: torch.Tensor, *, rows: bool = False) -> torch.Tensor:
    """Return local sums plus those of the other shards; a sum per row is whole already if the shards are rows."""
    if not is_sharded(parameter):
        return sums
    module = dtensor_module()
    sharded: Any = parameter
    by_row = rows and parameter.dim() > 1
    partial = [splits(placement) and not (by_row and placement.dim == 0) for placement in sharded.placements]
    placed = module.DTensor.from_local(
        sums,
        sharded.device_mesh,
        # a row's own shards are left out of the sum: each process keeps its rows
        [module.Partial() if is_partial else module.Replicate() for is_partial in partial],
        run_check=False,
    )
    added: torch.Tensor = placed.full_tensor()
    return added


def _summed(values: torch.Tensor, rows: bool) -> list[int]:
    return list(range(1 if rows and values.dim() > 1 else 0, values.dim()))


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
        if splits(place):
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
