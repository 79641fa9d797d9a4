"""Making the state of a parameter whole at its first update: the base's entries, then the wrappers'.

A base such as Adam makes its state only where `state[p]` is empty, so a wrapper's copy is taken before the base's
first update but stored after it.
"""

import inspect
from typing import TYPE_CHECKING, Any

import torch

from metaopt.errors import StepError
from metaopt.views import is_moment
from metaopt.wrapper import Slot

if TYPE_CHECKING:
    from metaopt.stack import Stack

Copies = dict[torch.Tensor, dict[str, torch.Tensor]]


def slot_dtype(slot: Slot, values: dict[str, Any], parameter: torch.Tensor) -> torch.dtype:
    """Return the dtype of a slot: the parameter's own, a named one, or the one that a hyperparameter names."""
    named = values.get(slot.dtype, slot.dtype) if slot.dtype is not None else None
    return parameter.dtype if named is None else getattr(torch, named)


def take_copies(stack: "Stack") -> Copies:
    """Take, before the base's update, what the wrappers must keep of parameters that lack it.

    Entries of wrappers that stand alone in `state[p]` (the base's were dropped) are lifted out as well: the base
    would take them for its own.
    """
    copies: Copies = {}
    for entry in stack.param_groups:
        _leave_fused_if_sparse(stack, entry)
        for p in entry["params"]:
            if p.grad is None:
                continue
            held = stack.state.get(p)
            if not held:
                set_aside = stack.set_aside.pop(p, None)
                if set_aside is not None:
                    stack.state[p] = set_aside
                copies[p] = _missing(stack, p, {})
            elif not any(stack.is_base_key(key) for key in held):
                kept = {**held, **_missing(stack, p, held)}
                del stack.state[p]
                fresh = constructor_state(stack.base, p)
                if fresh:
                    stack.state[p] = fresh
                copies[p] = kept
            else:
                missing = _missing(stack, p, held)
                if missing:
                    copies[p] = missing
    return copies


def store_copies(stack: "Stack", copies: Copies) -> None:
    """Put the copies into `state[p]`, after the base has made its own entries, with zeros for each of its moments."""
    for p, entries in copies.items():
        held = stack.state[p]
        held.update(entries)
        for label, wrapper in stack.labelled.items():
            for name, slot in wrapper.state_slots().items():
                if slot.kind == "moments":
                    _store_moments(stack, p, held, f"{label}.{name}")


def _missing(stack: "Stack", p: torch.Tensor, held: dict[str, Any]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for label, wrapper in stack.labelled.items():
        for name, slot in wrapper.state_slots().items():
            key = f"{label}.{name}"
            if key in held or slot.kind == "moments":
                continue
            dtype = slot_dtype(slot, vars(wrapper), p)
            if slot.kind == "zeros":
                found[key] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
            else:
                found[key] = p.detach().to(dtype, copy=True)
    return found


def _store_moments(stack: "Stack", p: torch.Tensor, held: dict[str, Any], key: str) -> None:
    own = [(k, v) for k, v in held.items() if stack.is_base_key(k)]
    for base_key, value in own:
        if isinstance(value, list):
            raise StepError(
                f"{key.split('.')[0]} cannot act on the moments of {type(stack.base).__name__}: "
                f"its state holds lists ({base_key}); use pullback_momentum='none'"
            )
        if is_moment(value, base_key, p):
            held.setdefault(f"{key}.{base_key}", torch.zeros_like(value))


def _leave_fused_if_sparse(stack: "Stack", entry: dict[str, Any]) -> None:
    """Turn the fused kernel off for a group with a sparse gradient, where it was our choice and no state exists."""
    if not (stack.fused_by_default and entry.get("fused")):
        return
    sparse = any(p.grad is not None and p.grad.is_sparse for p in entry["params"])
    if sparse and not any(stack.state.get(p) for p in entry["params"]):
        entry["fused"] = None


def set_constructor_state_aside(base: torch.optim.Optimizer) -> Copies:
    """Take out what a base such as Adagrad puts into `state` at construction; a base that has stepped keeps its own."""
    unstepped = [p for p, held in base.state.items() if "step" in held and not bool(held["step"])]
    return {p: base.state.pop(p) for p in unstepped}


def constructor_state(base: torch.optim.Optimizer, p: torch.Tensor) -> dict[str, Any]:
    """Return the state that the base's constructor makes for a parameter, newly made: {} for most bases."""
    # entries of a group are what the constructor takes; whatever else stands there belongs to clients and wrappers
    names = inspect.signature(type(base)).parameters
    with torch.enable_grad():
        scratch = type(base)(
            [torch.zeros_like(p).requires_grad_()], **{k: v for k, v in base.defaults.items() if k in names}
        )
    return dict(next(iter(scratch.state.values()), {}))
