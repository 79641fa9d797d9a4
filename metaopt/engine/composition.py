"""What a stack may be made of: order, labels, and the entries that its groups must hold."""

import re
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from metaopt.engine.begun_anew import counts_in_groups
from metaopt.engine.lanes import Entry, Lane
from metaopt.errors import HyperparameterError, SpecError, did_you_mean
from metaopt.schedule import Schedule
from metaopt.wrapper import Wrapper

if TYPE_CHECKING:
    from metaopt.stack import Stack

LABEL = re.compile(r"[a-z_][a-z0-9_]*")
# says of a group that nothing in the stack decays it; taken out where the stack completes the group
NO_DECAY = "metaopt.no_decay"
RUN_FLAGS = frozenset({"foreach", "fused", "capturable", "differentiable"})


def check(stack: "Stack") -> None:
    """Raise SpecError or HyperparameterError for parts that cannot work together."""
    _check_order(stack.wrappers)
    for lane in stack.lanes:
        if lane.name and lane.needs_closure:
            raise SpecError(
                f"the part {lane.name!r}: {type(lane.base).__name__} evaluates the loss itself, which all parts share: "
                f"it cannot be one of several bases"
            )
        _check_base(lane.base)
        check_labels(lane.chain)
        for wrapper in lane.chain:
            wrapper.validate()
            _check_evaluation(lane, wrapper)
        _check_moments(lane)
        _check_resets(stack, lane)


def _check_order(wrappers: Sequence[Wrapper]) -> None:
    """A wrapper that evaluates the loss does so before any other sees a gradient, so it cannot stand behind one."""
    for position, wrapper in enumerate(wrappers):
        earlier = [
            w.label
            for w in wrappers[:position]
            if "around" not in w.implemented_hooks() and "on_gradients" in w.implemented_hooks()
        ]
        if "around" in wrapper.implemented_hooks() and earlier:
            raise SpecError(
                f"{wrapper.label} makes the gradients that {earlier[0]} works on: write it before {earlier[0]}"
            )


def _check_base(base: torch.optim.Optimizer) -> None:
    """A base keeps its own state: one that hands the work to another optimizer would leave a stack without any."""
    for name, value in vars(base).items():
        if isinstance(value, torch.optim.Optimizer):
            outer, inner = type(base).__name__, type(value).__name__
            raise SpecError(
                f"{outer} is no base: it keeps {inner} in .{name}, whose state and updates a stack around it would not "
                f"see. Put the stack inside: give {outer} the stack, or a factory of it, in place of {inner}"
            )


def _check_evaluation(lane: Lane, wrapper: Wrapper) -> None:
    owns = "around" in wrapper.implemented_hooks()
    if lane.needs_closure and (owns or wrapper.may_skip_updates):
        what = "evaluates the loss itself" if owns else "holds updates back"
        raise SpecError(
            f"{wrapper.label} {what}, and {type(lane.base).__name__} evaluates the loss several times within one "
            f"update: the two do not go together"
        )
    if lane.needs_closure and any(slot.kind == "previous" for slot in wrapper.active_slots().values()):
        raise SpecError(
            f"{wrapper.label} compares an update with the gradient that made it, and {type(lane.base).__name__} makes "
            f"one of several gradients: the two do not go together"
        )
    if wrapper in lane.wrappers and lane.name and (owns or wrapper.may_skip_updates):
        what = "evaluates the loss, which all parts share" if owns else "holds updates back, which all parts count"
        raise SpecError(f"{wrapper.label} {what}: write it outside, before the base of the whole stack")


def _check_moments(lane: Lane) -> None:
    """Of wrappers of one class the innermost alone may act on the base's moments."""
    inner: dict[type, Wrapper] = {}
    for wrapper in (*lane.wrappers, *(w for w in lane.chain if w not in lane.wrappers)):
        needs_moments = any(s.kind == "moments" for s in wrapper.active_slots().values()) or wrapper.resets_base_state()
        if needs_moments and lane.needs_closure:
            raise SpecError(
                f"{wrapper.label} acts on the base's moments, but the state of {type(lane.base).__name__} "
                f"holds lists: use pullback_momentum='none'"
            )
        if needs_moments and type(wrapper) in inner:
            raise SpecError(
                f"{wrapper.label} acts on the base's moments, but {inner[type(wrapper)].label} stands nearer the base: "
                f"only the innermost may"
            )
        inner.setdefault(type(wrapper), wrapper)


def _check_resets(stack: "Stack", lane: Lane) -> None:
    entry = next((e for e in stack.param_groups if lane.holds(e) and e["params"]), None)
    if not lane.resets or entry is None:
        return
    try:
        counted = counts_in_groups(lane, entry)
    except Exception as error:  # whatever a class from elsewhere raises for settings that it cannot step with
        raise SpecError(
            f"{lane.resets[0].label} makes the base begin anew, but a step of {type(lane.base).__name__} over zeros "
            f"raises {type(error).__name__}: {error}; change its settings, or use pullback_momentum='none'"
        ) from error
    if counted:
        raise SpecError(
            f"{lane.resets[0].label} makes the base begin anew, but {type(lane.base).__name__} counts its updates in "
            f"its groups ({', '.join(counted)}), which goes on: bias correction would be that of a late update; "
            f"use pullback_momentum='none'"
        )


def check_labels(wrappers: Iterable[Wrapper]) -> None:
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


def check_group(stack: "Stack", group: Entry, position: int, *, built: bool = False) -> None:
    """Raise HyperparameterError for a group entry that no part has, that is out of bounds or that a schedule owns.

    A group that the base has `built` holds the base's defaults already: those are no settings of the user's.
    """
    where = f"group {group.get('name', position)}"
    lane = stack.lane_of(group)
    known = lane.hyperparameter_keys
    schedules = stack.schedules_of(group)
    if group.get("differentiable"):
        raise HyperparameterError(
            f"{where}: differentiable=True: a stack updates in place and cannot be differentiated through; leave it out"
        )
    for key in schedules.keys() & (known.keys() if group.get(NO_DECAY) else set()):
        if known[key][1] == "weight_decay" and key not in group:
            raise HyperparameterError(
                f"{where} is to have no decay, but the stack has a schedule for {key}: drop one of the two"
            )
    for key, value in group.items():
        if key in schedules and not (built and key not in known):
            raise HyperparameterError(
                f"{where} sets {key}={value!r}, but the stack has a schedule for it: "
                f"use lr_scale in the group to scale the learning rate, or drop one of the two"
            )
        if isinstance(value, Schedule):
            raise HyperparameterError(f"{where}: {key} has a schedule of its own: schedules belong to the whole stack")
        if key in known:
            wrapper, name = known[key]
            group[key] = wrapper.hyperparameters[name].validate(value, where=f"{where}, {wrapper.label}")
            if not wrapper.hyperparameters[name].per_group:
                _check_shared(stack, group, key, wrapper, name, where)
        elif "." in key and not key.startswith("metaopt."):
            raise HyperparameterError(f"{where}: no part of this stack has {key!r}.{did_you_mean(key, known)}")


def _check_shared(stack: "Stack", group: Entry, key: str, wrapper: Wrapper, name: str, where: str) -> None:
    # before the first group is complete the wrapper's own value is what the others will get
    others = [e.get(key, getattr(wrapper, name)) for e in stack.param_groups if e is not group] or [group[key]]
    if any(other != group[key] for other in others):
        raise HyperparameterError(
            f"{where} sets {key}={group[key]!r}, but {wrapper.label} acts on all groups at once, where it is "
            f"{others[0]!r}: give it in the stack, for all"
        )


def _scale_of(value: Any, entry: Entry) -> float:
    number = not isinstance(value, bool) and isinstance(value, Real | torch.Tensor)
    if not number or not 0.0 <= float(value) < float("inf"):
        where = f"group {entry['name']}" if "name" in entry else "a group"
        raise HyperparameterError(f"{where} sets lr_scale={value!r:.60}: it multiplies the rate, give a number >= 0")
    return float(value)


def complete(stack: "Stack", entry: Entry) -> None:
    """Give a group the entries that wrappers and engine keep in it, and apply its `lr_scale` once."""
    entry.setdefault("metaopt.updates", 0)
    entry.setdefault("metaopt.total_steps", stack.total_steps)
    entry.setdefault("metaopt.swapped", "")
    entry.setdefault("metaopt.template", "")
    scale = _scale_of(entry.pop("lr_scale", 1.0), entry)
    if "metaopt.lr_scale" not in entry:
        entry["metaopt.lr_scale"] = scale
        if scale != 1.0 and "lr" not in stack.schedules_of(entry):
            entry["lr"] = entry["lr"] * scale
    spared = entry.pop(NO_DECAY, False)
    lane = stack.lane_of(entry)
    # a part without hyperparameters has no other entry in a group: its state is known as a part's by this one
    entry["metaopt.labels"] = ",".join(lane.labelled)
    for key, (wrapper, name) in lane.hyperparameter_keys.items():
        value = getattr(wrapper, name)
        spares = spared and name == "weight_decay"
        entry.setdefault(key, 0.0 if spares or isinstance(value, Schedule) else value)
    for key in lane.counter_keys:
        # a group that comes later joins the others' count
        entry.setdefault(key, next((e[key] for e in stack.param_groups if key in e), 0))
