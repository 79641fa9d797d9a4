"""The factor that gradients wait for: folded into a fused kernel where there is one, multiplied in otherwise."""

from typing import TYPE_CHECKING

import torch

from metaopt.lanes import Lane
from metaopt.shards import dense, local

if TYPE_CHECKING:
    from metaopt.stack import Stack

# gradients wider than this are not folded into a fused kernel: its factor is float32
WIDEST_FOLDED = 4


def apply_scale(stack: "Stack", lane: Lane) -> None:
    """Multiply a lane's pending factor into its gradients, once."""
    factor, lane.pending_scale = lane.pending_scale, None
    if factor is None:
        return
    gradients: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for entry in stack.param_groups:
        for p in entry["params"] if lane.holds(entry) else ():
            if p.grad is not None:
                gradients.setdefault((p.device, p.grad.dtype), []).append(dense(local(p.grad)))
    for (device, _), members in gradients.items():
        torch._foreach_mul_(members, factor.to(device))


def apply_scales(stack: "Stack") -> None:
    """Multiply every pending factor into the gradients."""
    for lane in stack.lanes:
        apply_scale(stack, lane)


def fold_scale(stack: "Stack", lane: Lane) -> bool:
    """Hand a lane's pending factor to its base's fused kernel where that can take it, else multiply it in.

    Decided anew at each update: a loaded checkpoint or a client may have changed how a group runs.
    """
    if lane.pending_scale is None:
        return False
    entries = [entry for entry in stack.param_groups if lane.holds(entry)]
    foldable = (
        getattr(lane.base, "_step_supports_amp_scaling", False)
        and not lane.needs_closure
        and all(entry.get("fused") for entry in entries)
        and all(
            p.grad is None or (p.grad.element_size() <= WIDEST_FOLDED and not p.grad.is_sparse)
            for entry in entries
            for p in entry["params"]
        )
    )
    if not foldable:
        apply_scale(stack, lane)
        return False
    # the kernel divides by it
    lane.base.grad_scale = lane.pending_scale.reciprocal().to(torch.float32)  # type: ignore[attr-defined]
    lane.pending_scale = None
    return True
