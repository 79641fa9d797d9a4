"""The factor that gradients wait for: folded into a fused kernel where there is one, multiplied in otherwise."""

from typing import TYPE_CHECKING

import torch

from metaopt.engine.lanes import Lane
from metaopt.engine.shards import dense, local

if TYPE_CHECKING:
    from metaopt.stack import Stack

# gradients wider than this are not folded into a fused kernel: its factor is float32
WIDEST_FOLDED = 4


def apply_scale(stack: "Stack", lane: Lane) -> None:
    """Multiply a lane's gradients by what they wait for, once."""
    factor, lane.pending_scale = lane.pending_scale, None
    if factor is None:
        return
    gradients: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for entry in lane.entries(stack.param_groups):
        for p in entry["params"]:
            if p.grad is not None:
                gradients.setdefault((p.device, p.grad.dtype), []).append(dense(local(p.grad)))
    for (device, _), members in gradients.items():
        torch._foreach_mul_(members, factor.to(device))


def apply_scales(stack: "Stack") -> None:
    """Multiply all gradients by what they wait for."""
    for lane in stack.lanes:
        apply_scale(stack, lane)


def fold_scale(stack: "Stack", lane: Lane) -> None:
    """Hand a lane's factor to its base's fused kernel where that can take it, else multiply by it.

    Decided anew at each update: a loaded checkpoint or a client may have changed how a group runs.
    """
    if lane.pending_scale is None:
        return
    entries = lane.entries(stack.param_groups)
    foldable = (
        getattr(lane.base, "_step_supports_amp_scaling", False)
        and not lane.needs_closure
        and all(entry.get("fused") for entry in entries)
        and all(p.element_size() <= WIDEST_FOLDED for entry in entries for p in entry["params"])
    )
    if not foldable:
        apply_scale(stack, lane)
        return
    # the kernel divides by it in its own pass
    lane.base.grad_scale = lane.pending_scale.reciprocal().to(torch.float32)  # type: ignore[attr-defined]
    lane.pending_scale = None
