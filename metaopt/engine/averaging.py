"""Showing an average in place of the parameters, in place and undone exactly (law 13)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from metaopt.engine.gathered import drop_gathered_copies
from metaopt.engine.members import updated
from metaopt.engine.shards import local
from metaopt.engine.views import Piece, pieces
from metaopt.errors import StepError, did_you_mean

if TYPE_CHECKING:
    from metaopt.stack import Stack

# elements exchanged at a time, so that the temporary stays small
PIECE = 1 << 20
# a parameter, the part of it that this process holds, and its average
Shown = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@contextmanager
def swapped(stack: "Stack", label: str | None) -> Iterator[None]:
    """Hold the average called `label` in the parameters for the length of the context."""
    label = _choose(stack, label)
    shown = stack.param_groups[0]["metaopt.swapped"]
    if shown and stack.inside_averaged:
        raise StepError(f"averaged() inside averaged({shown!r}): leave that one first")
    swap_back(stack)
    swap_in(stack, label)
    _mark(stack, label)
    _tell_shards(stack)
    stack.inside_averaged = True
    try:
        yield
    finally:
        stack.inside_averaged = False
        # a checkpoint loaded inside the context has brought its own weights, or another average
        shown = stack.param_groups[0]["metaopt.swapped"]
        if shown:
            swap_out(stack, shown)
            _mark(stack, "")
        _tell_shards(stack)


def before_step(stack: "Stack") -> None:
    """Refuse a step inside the live context; swap back after a checkpoint that was taken inside one was loaded."""
    label = stack.param_groups[0].get("metaopt.swapped")
    if not label:
        return
    if stack.inside_averaged:
        raise StepError(f"step() inside averaged({label!r}): leave the context before the next update")
    swap_back(stack)


def before_gradients(stack: "Stack") -> None:
    """At `zero_grad()`: swap back after a checkpoint that was taken inside `averaged()` was loaded.

    Where it stands before the forward pass, as in torch's own examples, the first gradient is the fast weights' own.
    Where it stands behind, autograd must not take the weights for changed.
    """
    label = stack.param_groups[0].get("metaopt.swapped")
    if label and not stack.inside_averaged:
        members = tuple(local(p) for entry in stack.param_groups for p in entry["params"])
        with _unsafe_preserve_version_counter(members):
            swap_back(stack)


def swap_back(stack: "Stack") -> None:
    """Give the parameters the fast weights where a checkpoint that was taken inside `averaged()` has brought others."""
    label = stack.param_groups[0].get("metaopt.swapped")
    if label:
        swap_out(stack, label)
        _mark(stack, "")
        _tell_shards(stack)


def _choose(stack: "Stack", label: str | None) -> str:
    averages = list(
        dict.fromkeys(w.label for lane in stack.lanes for w in lane.chain if "averaged" in w.implemented_hooks())
    )
    if not averages:
        raise StepError("averaged(): no part of this stack keeps an average; see: metaopt list wrappers")
    if label is None:
        if len(averages) > 1:
            # the outermost of nested Lookaheads is no more the user's choice than the innermost
            raise StepError(f"averaged(): this stack keeps several averages: name one of {', '.join(averages)}")
        return averages[0]
    if label not in averages:
        raise StepError(
            f"averaged({label!r}): no average has this label.{did_you_mean(label, averages)} "
            f"There is: {', '.join(averages)}"
        )
    return label


def _mark(stack: "Stack", label: str) -> None:
    for entry in stack.param_groups:
        entry["metaopt.swapped"] = label


def _tell_shards(stack: "Stack") -> None:
    drop_gathered_copies(p for entry in stack.param_groups for p in entry["params"])


@torch.no_grad()
def swap_in(stack: "Stack", label: str) -> None:
    """Exchange parameters and averages, all or none.

    Where dtypes differ, or where an average is worked out and not kept, the parameter is kept beside it, unrounded.
    """
    done: list[Shown] = []
    try:
        for owner, parameter, average in _shown(stack, label):
            if average.dtype == parameter.dtype and _is_kept(stack, owner, label, average):
                exchange(parameter, average)
            else:
                stack.state[owner][f"{label}.fast"] = owner.detach().clone()
                parameter.copy_(average)
            done.append((owner, parameter, average))
    except BaseException:
        for shown in reversed(done):
            _take_back(stack, label, *shown)
        raise


@torch.no_grad()
def swap_out(stack: "Stack", label: str) -> None:
    """Undo `swap_in` exactly."""
    for shown in _shown(stack, label):
        _take_back(stack, label, *shown)


def _take_back(stack: "Stack", label: str, owner: torch.Tensor, parameter: torch.Tensor, average: torch.Tensor) -> None:
    fast = stack.state[owner].pop(f"{label}.fast", None)
    if fast is None:
        exchange(parameter, average)
    else:
        parameter.copy_(local(fast))


def _is_kept(stack: "Stack", owner: torch.Tensor, label: str, average: torch.Tensor) -> bool:
    """Tell whether an average is the wrapper's own state, not something worked out from it."""
    held = stack.state[owner].items()
    kept = [local(value) for key, value in held if key.startswith(f"{label}.") and isinstance(value, torch.Tensor)]
    return any(value.data_ptr() == average.data_ptr() and value.shape == average.shape for value in kept)


def _shown(stack: "Stack", label: str) -> Iterator[Shown]:
    """Yield each parameter that has an average, its local part, and the average."""
    for piece, averages in _averages(stack, label):
        yield from zip(piece.owners, piece.params, averages, strict=True)


def _averages(stack: "Stack", label: str) -> Iterator[tuple[Piece, list[torch.Tensor]]]:
    """Yield each piece of the stack with its average; a part of the stack without one keeps its weights."""
    for entry in stack.param_groups:
        lane = stack.lane_of(entry)
        wrapper = lane.labelled.get(label)
        if wrapper is None or "averaged" not in wrapper.implemented_hooks() or entry["metaopt.template"]:
            continue
        for piece in pieces(stack, entry, wrapper, updated(stack, entry, wrapper)):
            averages = wrapper.averaged(piece)
            if averages is not None:
                yield piece, averages


def exchange(a: torch.Tensor, b: torch.Tensor) -> None:
    """Exchange the contents of two tensors of one shape and dtype, a piece at a time."""
    rows = max(1, PIECE // max(1, a[0].numel())) if a.dim() and a.shape[0] else 1
    pairs = zip(torch.split(a, rows), torch.split(b, rows), strict=True) if a.dim() else [(a, b)]
    for x, y in pairs:
        held = x.clone()
        x.copy_(y)
        y.copy_(held)
