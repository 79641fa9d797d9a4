"""Making the state of a parameter whole at its first update: the base's entries, then the wrappers'.

A base such as Adam makes its state only where `state[p]` is empty, so a wrapper's copy is taken before the base's
first update but stored after it.
"""

import inspect
from typing import TYPE_CHECKING, Any

import torch

from metaopt.engine.begun_anew import of_wrappers
from metaopt.engine.fusing import serves
from metaopt.engine.lanes import ANEW, Entry, Lane
from metaopt.engine.views import is_moment
from metaopt.errors import StepError
from metaopt.wrapper import Slot

if TYPE_CHECKING:
    from metaopt.stack import Stack

Copies = dict[torch.Tensor, dict[str, torch.Tensor]]


def slot_dtype(slot: Slot, values: dict[str, Any], parameter: torch.Tensor) -> torch.dtype:
    """Return the dtype of a slot: the parameter's own, a named one, or the one that a hyperparameter names."""
    named = values.get(slot.dtype, slot.dtype) if slot.dtype is not None else None
    return parameter.dtype if named is None else getattr(torch, named)


def take_copies(stack: "Stack") -> Copies:
    """Return, before the base's update, what wrappers must keep of parameters whose state lacks it; change nothing.

    For parameters that the base begins anew, entries of wrappers that stand in `state[p]` already are among it.
    """
    copies: Copies = {}
    for entry in stack.param_groups:
        lane = stack.lane_of(entry)
        _check_members(stack, entry)
        of_template = entry["metaopt.template"]
        for p in entry["params"]:
            if p.grad is None:
                continue
            held = of_wrappers(lane, stack.state.get(p) or {})
            if of_template:
                held = {key: value for key, value in held.items() if key in lane.early_keys}
            missing = _missing(lane, p, held)
            if not any(lane.is_base_key(key) for key in held):
                copies[p] = {**held, **missing}
            elif missing or _lacks_moments(lane, held):
                copies[p] = missing
    return copies


def _check_members(stack: "Stack", entry: Entry) -> None:
    """Refuse a group with other members than it was made with, and another number; names may be out of date."""
    names, members = entry.get("param_names"), entry["params"]
    if names is not None and len(names) != len(members) and not all(map(stack.is_known, members)):
        raise StepError(
            f"a group of {len(names)} parameters ({', '.join(names[:3])}, ...) holds {len(members)} now: a client has "
            f"put others in their places. DeepSpeed's ZeRO does so: a rank gets a flat share, of which norms, shapes "
            f"and names are not the model's. Shard with FSDP2 (fully_shard) instead"
        )


def all_whole(stack: "Stack") -> bool:
    """Tell whether nothing is missing in the state of any parameter, also of those without a gradient."""
    state = stack.base.state
    for entry in stack.base.param_groups:
        lane = stack.lane_of(entry)
        keys = [key for key, _, slot in lane.slots if slot.kind != "moments"]
        for p in entry["params"]:
            held = state.get(p)
            if held is None or any(key not in held for key in keys):
                return False
            # dropped by a wrapper or a reset, and without a gradient since
            if held.get(ANEW) or (lane.resets and not any(lane.is_base_key(key) for key in held)):
                return False
    return True


def make_way(stack: "Stack", copies: Copies) -> Copies:
    """Right before the base's update: leave `state[p]` to the base where it begins anew, as its constructor would.

    Returns the entries of wrappers that stood there and are among the copies: see `put_back`.
    """
    lifted: Copies = {}
    if not copies:
        return lifted
    for entry in stack.param_groups:
        lane = stack.lane_of(entry)
        for p in entry["params"]:
            if p not in copies:
                continue
            held = stack.state.get(p)
            if held and not held.get(ANEW) and any(lane.is_base_key(key) for key in held):
                continue
            begun_before = stack.state.pop(p, None)
            if begun_before:
                lifted[p] = begun_before
            made = stack.set_aside.pop(p, None)
            if made is None and begun_before:
                made = constructor_state(lane.base, p)
            if made:
                stack.state[p] = made
    return lifted


def put_back(stack: "Stack", copies: Copies, lifted: Copies) -> None:
    """After an update that failed: lose no entry of a wrapper, and leave no state half made."""
    for p in copies:
        held = stack.state.get(p)
        if held:  # the base has begun; it may have moved the parameter, of which the copy is from before
            store_copies(stack, {p: copies[p]})
        elif p in lifted:
            stack.state[p] = lifted[p]


def store_copies(stack: "Stack", copies: Copies) -> None:
    """Put the copies into `state[p]`, after the base has made its own entries, with zeros for each of its moments."""
    lanes = {p: stack.lane_of(entry) for entry in stack.param_groups for p in entry["params"]} if copies else {}
    for p, entries in copies.items():
        if not entries and not stack.state.get(p):
            continue  # neither base nor wrapper keeps anything: no state at all, as for the bare base
        held = stack.state[p]
        held.update(entries)
        if lanes[p].resets:  # all hold the mark, as a distributed checkpoint wants it
            held.setdefault(ANEW, 0.0)
        else:
            held.pop(ANEW, None)
        for key, _ in lanes[p].moment_slots:
            _store_moments(lanes[p], p, held, key)


def _missing(lane: Lane, p: torch.Tensor, held: dict[str, Any]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for key, wrapper, slot in lane.slots:
        if key in held or slot.kind == "moments":
            continue
        dtype = slot_dtype(slot, vars(wrapper), p)
        if slot.kind == "zeros":
            found[key] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
        else:
            found[key] = p.detach().to(dtype, copy=True)
    return found


def _lacks_moments(lane: Lane, held: dict[str, Any]) -> bool:
    """Tell whether a checkpoint brought the base's moments without those that a wrapper keeps of them."""
    return any(not any(k.startswith(f"{key}.") for k in held if isinstance(k, str)) for key, _ in lane.moment_slots)


def _store_moments(lane: Lane, p: torch.Tensor, held: dict[str, Any], key: str) -> None:
    own = [(k, v) for k, v in held.items() if lane.is_base_key(k)]
    for base_key, value in own:
        if isinstance(value, list | dict):
            raise StepError(
                f"{key.split('.')[0]} cannot act on the moments of {type(lane.base).__name__}: "
                f"its state holds lists or dicts ({base_key}); use pullback_momentum='none'"
            )
        if is_moment(value, base_key, p):
            held.setdefault(f"{key}.{base_key}", torch.zeros_like(value))


def leave_refused_kernels(stack: "Stack", copies: Copies) -> None:
    """Turn the fused kernel off for groups whose tensors it cannot update, where it was our choice.

    Gradients may turn out sparse, and parameters may have another dtype or be DTensors since construction, or new.
    For one update alone where a parameter has its first gradient when others of its group had theirs before: the
    resumed run, which knows no more of it, is to take the same kernel as this one.
    """
    stack.kernels_settled = True
    for entry in stack.base.param_groups:
        lane = stack.lane_of(entry)
        if not (lane.fused_by_default and entry.get("fused")):
            continue
        sparse = any(p.grad is not None and p.grad.is_sparse for p in entry["params"])
        if sparse or not serves(type(lane.base), taken_by_constructor(lane.base), entry["params"]):
            entry["fused"] = None
        elif stack.awaits_latecomers and _mixes(stack, lane, entry, copies):
            entry["fused"] = None
            stack.unfused.append(entry)


def _mixes(stack: "Stack", lane: Lane, entry: Entry, copies: Copies) -> bool:
    """Tell whether some parameters of a group are updated for the first time and others are not."""
    held = [of_wrappers(lane, stack.state.get(p, {})) for p in entry["params"]]
    begun = [any(lane.is_base_key(key) for key in entries) for entries in held]
    late = [p in copies and not has_begun for p, has_begun in zip(entry["params"], begun, strict=True)]
    return any(begun) and any(late)


def set_constructor_state_aside(base: torch.optim.Optimizer) -> Copies:
    """Take out what a base such as Adagrad puts into `state` at construction; a base that has stepped keeps its own."""
    # a base may keep numbers of its own beside the parameters' state
    kept = {p: held for p, held in base.state.items() if isinstance(p, torch.Tensor) and isinstance(held, dict)}
    unstepped = [p for p, held in kept.items() if "step" in held and not bool(held["step"])]
    return {p: base.state.pop(p) for p in unstepped}


def constructor_state(base: torch.optim.Optimizer, p: torch.Tensor) -> dict[str, Any]:
    """Return the state that the base's constructor makes for a parameter, newly made: {} for most bases."""
    with torch.enable_grad():
        parameter = torch.zeros_like(p).requires_grad_()
        scratch = type(base)([parameter], **taken_by_constructor(base))
    return dict(scratch.state.get(parameter, {}))


def taken_by_constructor(base: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the defaults that the base's constructor takes; what else stands there belongs to clients and wrappers."""
    names = inspect.signature(type(base)).parameters
    return {k: v for k, v in base.defaults.items() if k in names}
