"""Which fused kernels torch can run on parameters of which each process holds a shard."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch


def refuses_shards(kind: type[torch.optim.Optimizer], given: Mapping[str, Any], params: Iterable[torch.Tensor]) -> bool:
    """Tell whether `kind(..., fused=True)` cannot step over the DTensors among `params`: torch has no rule for it.

    Found by trying on one element, without communication. False where there is no DTensor.
    """
    module = sys.modules.get("torch.distributed.tensor")
    sharded = next((p for p in params if module is not None and isinstance(p, module.DTensor)), None)
    if module is None or sharded is None:
        return False
    element = torch.zeros(1, device=sharded.device, dtype=sharded.dtype)
    probe = module.DTensor.from_local(element, sharded.device_mesh, sharded.placements).requires_grad_()
    probe.grad = torch.zeros_like(probe)
    try:
        kind([probe], **{**given, "fused": True}).step()
    except NotImplementedError:
        return True
    return False
