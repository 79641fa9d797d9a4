"""Which parameters of a group a wrapper acts on."""

from typing import TYPE_CHECKING

import torch

from metaopt.engine.lanes import Entry
from metaopt.wrapper import Wrapper

if TYPE_CHECKING:
    from metaopt.stack import Stack

Members = list[torch.Tensor]


def with_gradient(entry: Entry) -> Members:
    """Return the group's parameters that have a gradient."""
    return [p for p in entry["params"] if p.grad is not None]


def updated(stack: "Stack", entry: Entry, wrapper: Wrapper) -> Members:
    """Return the group's parameters that have been updated: those that hold the wrapper's state, if it has any.

    For a wrapper that compares with the weights before, those of this very update: the others' copies are stale.
    """
    seat = stack.lane_of(entry).seat(wrapper)
    if seat.compares:
        return stack.moved[id(entry)]
    state = stack.base.state
    if not seat.keys:
        return [p for p in entry["params"] if p in state or p.grad is not None]
    first, *others = seat.keys
    begun = [p for p in entry["params"] if p in state]
    found = [p for p in begun if first in state[p]]
    if others:
        found = [p for p in found if all(key in state[p] for key in others)]
    if len(found) < len(begun):  # a client has written state of the base alone since: it becomes whole at the next
        stack.look_again()
    return found
