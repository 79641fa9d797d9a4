"""Tensors of which this process may hold a part alone: their local part, and numbers reduced over all parts."""

import sys
from typing import Any

import torch


def _dtensor() -> Any:
    # a DTensor can only exist once its module was imported; importing it here would cost everyone half a second
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process holds: a DTensor's shard, any other tensor itself."""
    kind = _dtensor()
    return tensor.to_local() if kind is not None and isinstance(tensor, kind) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a number over all shards: a DTensor reduced and gathered, any other tensor itself."""
    kind = _dtensor()
    return tensor.full_tensor() if kind is not None and isinstance(tensor, kind) else tensor


def norm_over_shards(values: torch.Tensor, owner: torch.Tensor, *, rows: bool) -> torch.Tensor:
    """Return the 2-norm of `values`, the local part of something shaped like `owner`, over all shards.

    With `rows` one norm for each index of the first dimension, kept in shape; a vector counts as one row.
    """
    squares = _sum(values.abs().square() if values.is_complex() else values.square(), owner, rows)
    return squares.sqrt()


def mean_over_shards(values: torch.Tensor, owner: torch.Tensor, *, rows: bool) -> torch.Tensor:
    """Return the mean of `values`, a local part of something shaped like `owner`, over all shards; `rows` as there."""
    count = owner.numel()
    if rows and owner.dim() > 1:
        count //= max(1, owner.shape[0])
    return _sum(values, owner, rows) / max(1, count)


def _sum(values: torch.Tensor, owner: torch.Tensor, rows: bool) -> torch.Tensor:
    dims = list(range(1, values.dim())) if rows and values.dim() > 1 else list(range(values.dim()))
    keepdim = rows and values.dim() > 1
    kind = _dtensor()
    if kind is None or not isinstance(owner, kind):
        return values.sum(dim=dims, keepdim=keepdim) if dims else values
    module = sys.modules["torch.distributed.tensor"]
    placed = kind.from_local(values, owner.device_mesh, owner.placements, shape=owner.shape, stride=owner.stride())
    summed = placed.sum(dim=dims, keepdim=keepdim) if dims else placed
    # rows stay where their first dimension is; what other shards hold of a row is added to it
    wanted = [p if keepdim and p.is_shard(0) else module.Replicate() for p in owner.placements]
    result: torch.Tensor = summed.redistribute(placements=wanted).to_local()
    return result
