"""What a stack may be made of: order, labels, and the entries that its groups must hold."""

import re
from typing import TYPE_CHECKING, Any

from metaopt.errors import HyperparameterError, SpecError, did_you_mean
from metaopt.schedule import Schedule
from metaopt.wrapper import Wrapper

if TYPE_CHECKING:
    from metaopt.stack import Stack

LABEL = re.compile(r"[a-z_][a-z0-9_]*")
RUN_FLAGS = frozenset({"foreach", "fused", "capturable", "differentiable"})


def stands_before_base(wrapper: Wrapper) -> bool:
    """Tell whether a wrapper works on the closure or on gradients, which the base has yet to use."""
    return bool(wrapper.acts_on() & {"around", "on_gradients"})


def check(stack: "Stack") -> None:
    """Raise SpecError or HyperparameterError for parts that cannot work together."""
    check_labels(stack.wrappers)
    if any(entry.get("differentiable") for entry in stack.param_groups):
        raise HyperparameterError(
            "differentiable=True: a stack updates in place and cannot be differentiated through; leave it out"
        )
    inner: dict[type, Wrapper] = {}
    for wrapper in stack.wrappers:
        wrapper.check()
        needs_moments = any(s.kind == "moments" for s in wrapper.state_slots().values()) or wrapper.resets_base()
        if not needs_moments:
            inner.setdefault(type(wrapper), wrapper)
            continue
        if stack.needs_closure:
            raise SpecError(
                f"{wrapper.label} acts on the base's moments, but the state of {type(stack.base).__name__} "
                f"holds lists: use pullback_momentum='none'"
            )
        if type(wrapper) in inner:
            raise SpecError(
                f"{wrapper.label} acts on the base's moments, but {inner[type(wrapper)].label} stands nearer the base: "
                f"only the innermost may"
            )
        inner[type(wrapper)] = wrapper


def check_labels(wrappers: tuple[Wrapper, ...]) -> None:
    """Raise SpecError for a label that is malformed, reserved or taken."""
    seen: set[str] = set()
    for wrapper in wrappers:
        label = wrapper.label
        if not LABEL.fullmatch(label):
            raise SpecError(f"label {label!r}: a label is lower-case letters, digits and underscores")
        if label == "metaopt":
            raise SpecError("label 'metaopt' is reserved: choose another")
        if label in seen:
            raise SpecError(f"two parts are labelled {label!r}: give one of them another with label=")
        seen.add(label)


def wrapper_keys(stack: "Stack") -> dict[str, tuple[Wrapper, str]]:
    """Return every group entry that belongs to a wrapper: key -> (wrapper, hyperparameter)."""
    return {f"{w.label}.{name}": (w, name) for w in stack.wrappers for name in w.hyperparameters}


def check_group(stack: "Stack", group: dict[str, Any], position: int, *, built: bool = False) -> None:
    """Raise HyperparameterError for a group entry that no part has, that is out of bounds or that a schedule owns.

    A group that the base has `built` holds the base's defaults already: those are no settings of the user's.
    """
    where = f"group {group.get('name', position)}"
    known = wrapper_keys(stack)
    for key, value in group.items():
        if key in stack.schedules and not (built and key not in known):
            raise HyperparameterError(
                f"{where} sets {key}={value!r}, but the stack has a schedule for it: "
                f"use lr_scale in the group to scale the learning rate, or drop one of the two"
            )
        if isinstance(value, Schedule):
            raise HyperparameterError(f"{where}: {key} has a schedule of its own: schedules belong to the whole stack")
        if key in known:
            wrapper, name = known[key]
            group[key] = wrapper.hyperparameters[name].check(value, where=f"{where}, {wrapper.label}")
        elif "." in key and not key.startswith("metaopt."):
            raise HyperparameterError(f"{where}: no part of this stack has {key!r}.{did_you_mean(key, known)}")


def complete(stack: "Stack", entry: dict[str, Any]) -> None:
    """Give a group the entries that wrappers and engine keep in it, and apply its `lr_scale` once."""
    entry.setdefault("metaopt.updates", 0)
    entry.setdefault("metaopt.total_steps", stack.total_steps)
    entry.setdefault("metaopt.swapped", "")
    entry.setdefault("metaopt.template", False)
    scale = float(entry.pop("lr_scale", 1.0))
    if "metaopt.lr_scale" not in entry:
        entry["metaopt.lr_scale"] = scale
        if scale != 1.0 and "lr" not in stack.schedules:
            entry["lr"] = entry["lr"] * scale
    for key, (wrapper, name) in wrapper_keys(stack).items():
        value = getattr(wrapper, name)
        entry.setdefault(key, 0.0 if isinstance(value, Schedule) else value)
