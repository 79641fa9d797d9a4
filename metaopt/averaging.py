"""Showing an average in place of the parameters, in place and undone exactly (law 13)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from metaopt.errors import StepError, did_you_mean
from metaopt.views import local, pieces
from metaopt.wrapper import Wrapper

if TYPE_CHECKING:
    from metaopt.stack import Stack

# elements exchanged at a time, so that the temporary stays small
PIECE = 1 << 20


@contextmanager
def swapped(stack: "Stack", label: str | None) -> Iterator[None]:
    """Hold the average called `label` in the parameters for the length of the context."""
    wrapper = _choose(stack, label)
    if stack.param_groups[0]["metaopt.swapped"]:
        raise StepError(f"averaged() inside averaged({stack.param_groups[0]['metaopt.swapped']}): leave that one first")
    _mark(stack, wrapper.label)
    swap_in(stack, wrapper)
    stack.inside_averaged = True
    try:
        yield
    finally:
        stack.inside_averaged = False
        # a checkpoint loaded inside the context has brought its own weights
        if stack.param_groups[0]["metaopt.swapped"]:
            swap_out(stack, wrapper)
            _mark(stack, "")


def before_step(stack: "Stack") -> None:
    """Refuse a step inside the live context; swap back after a checkpoint that was taken inside one was loaded."""
    label = stack.param_groups[0].get("metaopt.swapped")
    if not label:
        return
    if stack.inside_averaged:
        raise StepError(f"step() inside averaged({label!r}): leave the context before the next update")
    wrapper = stack.labelled.get(label)
    if wrapper is not None:
        swap_out(stack, wrapper)
    _mark(stack, "")


def _choose(stack: "Stack", label: str | None) -> Wrapper:
    averages = {w.label: w for w in stack.wrappers if "averaged" in w.acts_on()}
    if not averages:
        raise StepError("averaged(): this stack keeps no average; lookahead and ema do")
    if label is None:
        if len(averages) > 1:
            # the outermost of nested Lookaheads is no more the user's choice than the innermost
            raise StepError(f"averaged(): this stack keeps several averages: name one of {', '.join(averages)}")
        return next(iter(averages.values()))
    if label not in averages:
        raise StepError(
            f"averaged({label!r}): no average has this label.{did_you_mean(label, averages)} "
            f"There is: {', '.join(averages)}"
        )
    return averages[label]


def _mark(stack: "Stack", label: str) -> None:
    for entry in stack.param_groups:
        entry["metaopt.swapped"] = label


@torch.no_grad()
def swap_in(stack: "Stack", wrapper: Wrapper) -> None:
    """Exchange parameters and average; where dtypes differ keep the parameter beside it, unrounded."""
    key = f"{wrapper.label}.fast"
    for position, entry in enumerate(stack.param_groups):
        for piece in pieces(stack, position, wrapper, stack.updated(entry, wrapper)):
            averages = wrapper.averaged(piece)
            if averages is None:
                continue
            for owner, parameter, average in zip(piece.owners, piece.params, averages, strict=True):
                if average.dtype == parameter.dtype:
                    exchange(parameter, average)
                else:
                    stack.state[owner][key] = owner.detach().clone()
                    parameter.copy_(average)


@torch.no_grad()
def swap_out(stack: "Stack", wrapper: Wrapper) -> None:
    """Undo `swap_in` exactly."""
    key = f"{wrapper.label}.fast"
    for position, entry in enumerate(stack.param_groups):
        for piece in pieces(stack, position, wrapper, stack.updated(entry, wrapper)):
            averages = wrapper.averaged(piece)
            if averages is None:
                continue
            for owner, parameter, average in zip(piece.owners, piece.params, averages, strict=True):
                fast = stack.state[owner].pop(key, None)
                if fast is None:
                    exchange(parameter, average)
                else:
                    parameter.copy_(local(fast))


def exchange(a: torch.Tensor, b: torch.Tensor) -> None:
    """Exchange the contents of two tensors of one shape and dtype, a piece at a time."""
    rows = max(1, PIECE // max(1, a[0].numel())) if a.dim() and a.shape[0] else 1
    pairs = zip(torch.split(a, rows), torch.split(b, rows), strict=True) if a.dim() else [(a, b)]
    for x, y in pairs:
        held = x.clone()
        x.copy_(y)
        y.copy_(held)
