"""Which fused kernels torch can run, and runs rightly: found by trying them on a few elements."""

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices


def serves(kind: type[torch.optim.Optimizer], given: Mapping[str, Any], params: Sequence[torch.Tensor]) -> bool:
    """Tell whether `kind(..., fused=True)` updates all of these parameters, and rightly."""
    devices = _get_fused_kernels_supported_devices()
    possible = all(p.device.type in devices and p.is_floating_point() and not p.is_sparse for p in params)
    return possible and not _refuses_shards(kind, given, params) and not _computes_otherwise(kind, given, params)


def _refuses_shards(
    kind: type[torch.optim.Optimizer], given: Mapping[str, Any], params: Sequence[torch.Tensor]
) -> bool:
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


def _computes_otherwise(
    kind: type[torch.optim.Optimizer], given: Mapping[str, Any], params: Sequence[torch.Tensor]
) -> bool:
    """Tell whether `kind(..., fused=True)` moves 16-bit parameters elsewhere than the plain loop does.

    The fused SGD of torch 2.13 on a CPU leaves whole vectors of them unmoved (pytorch#191763).
    """
    sixteen_bits = {(p.device, p.dtype) for p in params if p.element_size() == 2}
    settings = tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in given.items())
    return any(not _agree(kind, settings, device, dtype) for device, dtype in sixteen_bits)  # type: ignore[arg-type]


@cache  # asked anew whenever parameters may have changed
def _agree(
    kind: type[torch.optim.Optimizer], settings: tuple[tuple[str, Any], ...], device: torch.device, dtype: torch.dtype
) -> bool:
    # whole vectors and a remainder, whatever the processor's vectors hold
    gradient = torch.linspace(-1.0, 1.0, 130, device=device).to(dtype)
    ends = []
    for fused in (True, False):
        probe = torch.ones_like(gradient).requires_grad_()
        probe.grad = gradient.clone()
        # a warm-up begins at 0, where nothing would show
        try:
            kind([probe], **{**dict(settings), "lr": 0.1, "fused": fused}).step()
        except Exception:  # what no step can work with is told by the first step of the unfused kernel
            return False
        ends.append(probe.detach().float())
    found, expected = ends
    return torch.allclose(found, expected, rtol=0.05, atol=0.02)


def refuses_latecomers(kind: type[torch.optim.Optimizer], given: Mapping[str, Any]) -> bool:
    """Tell whether `kind(..., fused=True)` cannot update a parameter for the first time beside one that it has before.

    The fused SGD of torch 2.13 cannot with momentum: a parameter that was frozen, or whose gradient comes late.
    """
    first, late = (torch.zeros(1).requires_grad_() for _ in range(2))
    opt = kind([first, late], **{**given, "fused": True})
    try:
        for members in ((first,), (first, late)):
            for p in members:
                p.grad = torch.zeros_like(p)
            opt.step()
    except Exception:  # a setting that no step can work with, too, is told by the first step of the unfused kernel
        return True
    return False
