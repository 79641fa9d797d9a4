"""The template step: distributed checkpoint makes state appear by one step that must not count (law 16)."""

import copy
from typing import TYPE_CHECKING

import torch

from metaopt import first_update

if TYPE_CHECKING:
    from metaopt.stack import Stack


def is_template_step(stack: "Stack") -> bool:
    """Tell whether this `step()` comes from a client that set `lr` to 0 on a stack without state, gradients all zero.

    Reads gradients from the device, but only where the state is empty and every rate is 0.
    """
    if stack.state or not stack.param_groups:
        return False
    for position, entry in enumerate(stack.param_groups):
        if "lr" not in entry or not _is_zero(entry["lr"]) or not stack.lr_is_foreign(position):
            return False
    gradients = [p.grad for entry in stack.param_groups for p in entry["params"] if p.grad is not None]
    return bool(gradients) and not any(bool(gradient.any()) for gradient in gradients)


def make_state(stack: "Stack") -> None:
    """Let the base and the wrappers make their state; counters, schedules and parameters stay as they are."""
    kept = [{k: copy.copy(v) for k, v in entry.items() if k != "params"} for entry in stack.param_groups]
    set_aside = {p: copy.deepcopy(held) for p, held in stack.set_aside.items()}
    copies = first_update.take_copies(stack)
    if stack.needs_closure:
        stack.step_base(lambda: torch.zeros(()))
    else:
        stack.step_base()
    first_update.store_copies(stack, copies)
    stack.set_aside = set_aside
    # a base may count in its groups (schedule-free ones do): that count is undone with the rest
    for entry, before in zip(stack.param_groups, kept, strict=True):
        entry.update(before)
        entry["metaopt.template"] = True


def leave(stack: "Stack") -> None:
    """Before a real update: forget what a template step left, so that the base starts as if it had never stepped."""
    if stack.param_groups[0].get("metaopt.template"):
        stack.state.clear()
        for entry in stack.param_groups:
            entry["metaopt.template"] = False


def _is_zero(rate: float | torch.Tensor) -> bool:
    return float(rate) == 0.0
