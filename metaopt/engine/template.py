"""The template step: state is made to appear by one step that must not count (law 16).

Distributed checkpoint makes one, and the engine does for wrappers that need state before the base's first update.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch

from metaopt.engine import first_update
from metaopt.engine.dividing import step_bases

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


def make_state(stack: "Stack", mark: Literal["asked", "made"]) -> None:
    """Let the base and the wrappers make their state; counters, schedules and parameters stay as they are.

    It stands in the groups whether a client has asked for it, with nothing gathered yet, or a wrapper has needed it.
    """
    known = [set(entry) for entry in stack.param_groups]
    copies = first_update.take_copies(stack)
    with _undone(stack):
        try:
            first_update.leave_refused_kernels(stack, copies)
            first_update.make_way(stack, copies)
            step_bases(stack, *((lambda: torch.zeros(())),) if stack.needs_closure else ())
            first_update.store_copies(stack, copies)
        except BaseException:
            for p in copies:
                stack.state.pop(p, None)
            raise
    # entries that the base added stay until the first update: a flattened checkpoint is read by the keys of the groups
    for entry, before in zip(stack.param_groups, known, strict=True):
        added = [*_added(entry), *(key for key in entry if key not in before)]
        entry["metaopt.template"] = " ".join([mark, *added])


def _added(entry: dict[str, Any]) -> list[str]:
    """Return the entries that the base has added to a group in template steps."""
    return str(entry["metaopt.template"]).split()[1:]


@contextmanager
def _undone(stack: "Stack") -> Iterator[None]:
    """Undo what a base does in a step besides making its state: some count in groups or attributes, some move weights.

    Rates of 0 and gradients of 0 make a few bases divide by 0.
    """
    entries = [{k: _kept(v) for k, v in entry.items() if k != "params"} for entry in stack.param_groups]
    set_aside = {p: copy.deepcopy(held) for p, held in stack.set_aside.items()}
    attributes = [_plain(vars(lane.base)) for lane in stack.lanes]
    members = [p for entry in stack.param_groups for p in entry["params"]]
    # torch's own leave the weights alone at a rate of 0: no copies of large models for them
    foreign = {lane.name for lane in stack.lanes if not type(lane.base).__module__.startswith("torch.optim.")}
    moved = [p for entry in stack.param_groups if stack.lane_of(entry).name in foreign for p in entry["params"]]
    weights = [p.detach().clone() for p in moved]
    try:
        with torch.random.fork_rng({p.device for p in members if p.device.type == "cuda"}):
            yield
    finally:
        stack.set_aside = set_aside
        for entry, held in zip(stack.param_groups, entries, strict=True):
            entry.update(held)
        for lane, held in zip(stack.lanes, attributes, strict=True):
            vars(lane.base).update(held)
        for p, before in zip(moved, weights, strict=True):
            p.copy_(before)


def make_early_state(stack: "Stack") -> None:
    """Give parameters with a gradient the state that a wrapper needs before the base's first update of them."""
    if any(entry["metaopt.template"].startswith("asked") for entry in stack.param_groups):
        # made for all parameters, also for those that never have a gradient
        leave(stack, keep_early=False)
    lacking = [
        p
        for entry in stack.param_groups
        if (early := stack.lane_of(entry).early_keys)
        for p in entry["params"]
        if p.grad is not None and not early <= stack.state.get(p, {}).keys()
    ]
    if not lacking:
        return
    if stack.state and not stack.param_groups[0]["metaopt.template"]:
        # the run has begun: the base makes its entries of these parameters at their own first update
        for p, entries in first_update.take_copies(stack).items():
            early = stack.lane_of(stack.entry_of(p)).early_keys
            stack.state[p].update({key: value for key, value in entries.items() if key in early})
        stack.look_again()
        return
    rates = [entry.get("lr") for entry in stack.param_groups]
    members = [p for entry in stack.param_groups for p in entry["params"]]
    gradients = [p.grad for p in members]
    try:
        # of the others there is state already, with what was gathered in it
        for p in members:
            p.grad = None
        for p in lacking:
            p.grad = torch.zeros_like(p)
            stack.state.pop(p, None)
        for entry in stack.param_groups:
            if "lr" in entry:
                entry["lr"] = torch.zeros_like(entry["lr"]) if isinstance(entry["lr"], torch.Tensor) else 0.0
        make_state(stack, "made")
    finally:
        for p, gradient in zip(members, gradients, strict=True):
            p.grad = gradient
        for entry, rate in zip(stack.param_groups, rates, strict=True):
            if rate is not None:
                entry["lr"] = rate


def leave(stack: "Stack", *, keep_early: bool = True) -> None:
    """Before a real update: forget what a template step left, so that the base starts as if it had never stepped.

    What a wrapper has gathered since stays, its early state, unless nothing was.
    """
    for entry in stack.param_groups:
        if not entry["metaopt.template"]:
            continue
        for added in _added(entry):
            entry.pop(added, None)
        entry["metaopt.template"] = ""
        early = stack.lane_of(entry).early_keys if keep_early else frozenset()
        for p in entry["params"]:
            held = {key: value for key, value in stack.state.pop(p, {}).items() if key in early}
            if held:
                stack.state[p] = held
    stack.look_again()


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return copies of the attributes in which a base may count beside state and groups: numbers, and dicts of them."""
    numbers = (bool, int, float, str, type(None))
    return {
        name: copy.copy(value)
        for name, value in attributes.items()
        if isinstance(value, numbers)
        or (type(value) is dict and all(isinstance(held, numbers) for held in value.values()))
    }


def _kept(value: Any) -> Any:
    # a tensor keeps its identity: a schedule recognises the value that it wrote by it
    return value if isinstance(value, torch.Tensor) else copy.copy(value)


def _is_zero(rate: float | torch.Tensor) -> bool:
    return float(rate) == 0.0
