"""One update: gradients are filtered, the bases step, the wrappers behind them act."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from metaopt import first_update, template
from metaopt.dividing import step_bases
from metaopt.evaluation import Evaluation
from metaopt.lanes import Entry, Lane, with_gradient
from metaopt.scaling import fold_scale
from metaopt.views import pieces, small_pieces
from metaopt.wrapper import Group, Wrapper

if TYPE_CHECKING:
    from metaopt.stack import Stack

# a wrapper and the lane that it belongs to; None: it stands around all lanes
Placed = tuple[Wrapper, Lane | None]
Members = list[torch.Tensor]


class Phases:
    """Which wrappers act in which phase of an update, in order: found once, when a stack is made."""

    def __init__(self, wrappers: Sequence[Wrapper], lanes: Sequence[Lane]) -> None:
        own: list[Placed] = [(wrapper, None) for wrapper in wrappers]
        inner: list[Placed] = [(wrapper, lane) for lane in lanes for wrapper in lane.wrappers]
        self.around = [wrapper for wrapper, _ in own if "around" in wrapper.acts_on()]
        self.on_gradients = [placed for placed in (*own, *inner) if "on_gradients" in placed[0].acts_on()]
        self.before_update = [placed for placed in (*own, *inner) if "before_update" in placed[0].acts_on()]
        self.after_update = [placed for placed in (*inner, *own) if "after_update" in placed[0].acts_on()]
        self.stateful = any(lane.slots for lane in lanes)
        self.take_previous = any(lane.previous_slots for lane in lanes)
        self.gather_early = any(lane.early_keys for lane in lanes)


def copies_before_update(stack: "Stack") -> first_update.Copies:
    """Return what wrappers must keep of parameters at their first update; looks at none where all are known whole."""
    state = stack.state
    if not (stack.phases.stateful or stack.set_aside or stack.updates == 0):
        return {}
    if stack.found_whole == len(state) == sum(len(entry["params"]) for entry in stack.param_groups):
        return {}
    return first_update.take_copies(stack)


def update(stack: "Stack", run: Evaluation) -> None:
    """Make the update from the gradients as they are now, with everything before and behind the bases."""
    phases = stack.phases
    template.leave(stack)
    first_update.make_way(stack, stack.copies)
    for wrapper, lane in phases.before_update:
        for entry in _due(stack, wrapper, lane, update_in_progress=True):
            _call(wrapper.before_update, stack, entry, wrapper, with_gradient(entry))
    # a base may take gradients away inside its step: which parameters it updates is known now alone
    moved = _take_previous(stack) if phases.take_previous else {}
    _step_folded(stack, run)
    stack.found_whole = len(stack.state)
    copies, stack.copies = stack.copies, {}
    first_update.store_copies(stack, copies)
    for entry in stack.param_groups:
        entry["metaopt.updates"] += 1
    for wrapper, lane in phases.after_update:
        previous = any(slot.kind == "previous" for slot in wrapper.state_slots().values())
        for entry in _due(stack, wrapper, lane):
            # beside weights from before this update only those that it moved mean anything
            members = moved[id(entry)] if previous else updated(stack, entry, wrapper)
            _call(wrapper.after_update, stack, entry, wrapper, members)


def _step_folded(stack: "Stack", run: Evaluation) -> None:
    folded = [lane for lane in stack.lanes if fold_scale(stack, lane)]
    try:
        if run.closure is None:
            step_bases(stack)
        else:
            step_bases(stack, run.replay)
    finally:
        for lane in folded:
            del lane.base.grad_scale  # type: ignore[attr-defined]
    # a torch scheduler bound to the base before it was wrapped looks here
    stack.base._opt_called = True  # type: ignore[attr-defined]


def _take_previous(stack: "Stack") -> dict[int, Members]:
    """Copy the parameters that have gradients for the wrappers that ask for it; return them, by group."""
    moved = {id(entry): with_gradient(entry) for entry in stack.param_groups}
    for entry in stack.param_groups:
        for key in stack.lane_of(entry).previous_slots:
            for p in moved[id(entry)]:
                stack.held(p)[key].copy_(p)
    return moved


def updated(stack: "Stack", entry: Entry, wrapper: Wrapper) -> Members:
    """Return the group's parameters that have been updated: those that hold the wrapper's state, if it has any."""
    state = stack.state
    keys = [f"{wrapper.label}.{name}" for name, slot in wrapper.state_slots().items() if slot.kind != "moments"]
    if not keys:
        return [p for p in entry["params"] if p in state or p.grad is not None]
    return [p for p in entry["params"] if p in state and all(key in state[p] for key in keys)]


def _due(stack: "Stack", wrapper: Wrapper, lane: Lane | None, *, update_in_progress: bool = False) -> list[Entry]:
    """Return the groups for which a wrapper acts at this update, which counts already once it was made."""
    entries = stack.param_groups if lane is None else lane.entries(stack.param_groups)
    if wrapper.every is None:
        return entries
    key = f"{wrapper.label}.{wrapper.every}"
    return [entry for entry in entries if (entry["metaopt.updates"] + update_in_progress) % entry[key] == 0]


def _call(method: Callable[[Group], None], stack: "Stack", entry: Entry, wrapper: Wrapper, members: Members) -> None:
    for piece in (small_pieces if wrapper.each else pieces)(stack, entry, wrapper, members):
        method(piece)
