"""Which parameters of a group a wrapper acts on: those with its state, with a gradient, not frozen. Moves no tensor."""

from itertools import repeat
from operator import attrgetter, contains
from typing import Any

import torch

from metaopt.engine.chain import ParamGroup
from metaopt.engine.update.change import Params
from metaopt.engine.update.update import Update
from metaopt.wrapper import Wrapper


def updated_params(update: Update, group: ParamGroup, wrapper: Wrapper) -> Params:
    """Return the group's parameters that have been updated: those that have the wrapper's state, if it has any.

    For a wrapper that uses the previous weights, those of this update: of the others there are none.
    """
    run = update.run
    slots = run.structure.chain_of(group).slots_of(wrapper)
    if slots.uses_previous and update.change.weights_before:
        params = update.params_of(group)
        return [p for p in params if all(key in run.state[p] for key in slots.state_keys)]
    state = run.state
    if not slots.state_keys:
        return [p for p in group["params"] if p in state or p.grad is not None]
    keys, params = slots.state_keys, group["params"]
    # one look-up for each parameter: the hash of a tensor takes as long as a call of torch
    entries: list[Any] = list(map(state.get, params))
    if all(entries) and all(all(map(contains, entries, repeat(key))) for key in keys):
        return list(params)
    begun = [(p, entry) for p, entry in zip(params, entries, strict=True) if entry is not None]
    found = [p for p, entry in begun if all(key in entry for key in keys)]
    if len(found) < len(begun):
        known = {id(p) for p in (*found, *(run.incomplete or ()))}
        if any(id(p) not in known for p, _ in begun):
            run.invalidate()  # a client has since written state of the base only: the next update completes it
    return found


def trained_params(update: Update, group: ParamGroup, wrapper: Wrapper) -> Params:
    """Return what `after_update` acts on: the updated parameters, without the frozen ones if it moves weights."""
    found = updated_params(update, group, wrapper)
    if wrapper.acts_on_frozen or all(map(attrgetter("requires_grad"), found)):
        return found
    return [p for p in found if is_trained(p)]


def is_trained(p: torch.Tensor) -> bool:
    """Return whether a parameter is not frozen; who sets gradients by hand need not set `requires_grad`."""
    return p.requires_grad or p.grad is not None
