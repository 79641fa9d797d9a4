"""Tensors of which this process may hold a part alone: their local part, and numbers reduced over all parts."""

import sys
from typing import Any

import torch

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


def _dtensor() -> Any:
    # a DTensor can only exist once its module was imported; importing it here would cost everyone half a second
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process holds: a DTensor's shard, any other tensor itself."""
    kind = _dtensor()
    return tensor.to_local() if kind is not None and isinstance(tensor, kind) else tensor


def all_local(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the parts of tensors that this process holds."""
    return tensors if _PLAIN.issuperset(map(type, tensors)) else [local(tensor) for tensor in tensors]


def dense(gradient: torch.Tensor) -> torch.Tensor:
    """Return the values of a gradient: a coalesced sparse one's stored values, a dense one itself."""
    return gradient._values() if gradient.is_sparse else gradient


def norm_over_shards(values: torch.Tensor, owner: torch.Tensor, *, rows: bool) -> torch.Tensor:
    """Return the 2-norm of `values`, a local part of something shaped like `owner`, over all shards.

    With `rows` one norm for each index of the first dimension, kept in shape; a vector counts as one row.
    """
    norm: torch.Tensor = torch.linalg.vector_norm(values, dim=_summed(values, rows), keepdim=rows)
    kind = _dtensor()
    if kind is None or not isinstance(owner, kind):
        return norm
    total: torch.Tensor = _over_shards(norm.to(_wide(norm.dtype)).square(), owner, rows)
    return total.sqrt().to(norm.dtype)


def mean_over_shards(values: torch.Tensor, owner: torch.Tensor, *, rows: bool) -> torch.Tensor:
    """Return the mean of `values`, a local part of something shaped like `owner`, over all shards; `rows` as there."""
    count = owner.numel()
    if rows and owner.dim() > 1:
        count //= max(1, owner.shape[0])
    dims = _summed(values, rows)
    total = values.sum(dim=dims, keepdim=rows, dtype=_wide(values.dtype)) if dims else values
    kind = _dtensor()
    if kind is not None and isinstance(owner, kind):
        total = _over_shards(total, owner, rows)
    return (total / max(1, count)).to(values.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which many numbers of this one are added up: 16 bits hold no sum beyond 65504."""
    return torch.promote_types(dtype, torch.float32)


def _summed(values: torch.Tensor, rows: bool) -> list[int]:
    return list(range(1 if rows and values.dim() > 1 else 0, values.dim()))


def _over_shards(sums: torch.Tensor, owner: Any, rows: bool) -> torch.Tensor:
    """Add what the other shards hold; a sum per row is whole already where the shards are made of rows."""
    module = sys.modules["torch.distributed.tensor"]
    by_row = rows and owner.dim() > 1
    partial = [placed.is_shard() and not (by_row and placed.is_shard(0)) for placed in owner.placements]
    placed = module.DTensor.from_local(
        sums,
        owner.device_mesh,
        # a row's own shards are left out of the sum: each process keeps its rows
        [module.Partial() if is_partial else module.Replicate() for is_partial in partial],
        run_check=False,
    )
    added: torch.Tensor = placed.full_tensor()
    return added
