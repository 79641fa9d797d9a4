"""The state of a parameter: what wrappers add at its first update, and placeholders for what the base has not made yet.

A base such as Adam makes its state only if `state[p]` is empty. So the wrappers' tensors are copied before the base's
first update of a parameter, but stored after it.

A distributed checkpoint needs the same keys for every parameter. What the base has yet to make is therefore shown by
placeholders: what a scratch base makes of zeros. They stand in the copy that `state_dict()` returns, and in the live
state only if a client asked for it by its template step, a `step()` with rates and gradients of 0; the next update
removes them first.
"""

from typing import Any

import torch

from metaopt.distributed.shards import local
from metaopt.engine.chain import PLACEHOLDER, Chain, ParamGroup, ParamState, is_moment
from metaopt.engine.run import TEMPLATE, Run
from metaopt.engine.update import Update
from metaopt.errors import StepError
from metaopt.slots import Slot
from metaopt.wrapper import Wrapper

# ---- the first update of a parameter


def slot_dtype(slot: Slot, values: dict[str, Any], parameter: torch.Tensor) -> torch.dtype:
    """Return the dtype of a slot: the parameter's own, a named one, or the one that a hyperparameter names."""
    named = values.get(slot.dtype, slot.dtype) if slot.dtype is not None else None
    if named is None:
        return parameter.dtype
    if named == "at least float32":
        wide = torch.promote_types(parameter.dtype, torch.float32)
        return wide.to_real() if slot.kind == "number" else wide
    dtype: torch.dtype = getattr(torch, named)
    return dtype


def slot_device(slot: Slot, values: dict[str, Any], parameter: torch.Tensor) -> torch.device:
    """Return the device of a slot: the parameter's own, a named one, or the one that a hyperparameter names."""
    named = values.get(slot.device, slot.device) if slot.device is not None else None
    return parameter.device if named is None else torch.device(named)


def copy_for_slot(value: torch.Tensor, slot: Slot, values: dict[str, Any], parameter: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor in the dtype and on the device of its slot; pinned if on another device."""
    dtype, device = slot_dtype(slot, values, parameter), slot_device(slot, values, parameter)
    if device.type == "cpu" and parameter.device.type != "cpu":
        pinned = torch.empty_like(value, dtype=dtype, device=device, pin_memory=True)
        return pinned.copy_(value.detach())
    return value.detach().to(device=device, dtype=dtype, copy=True)


def _initial(slot: Slot, values: dict[str, Any], p: torch.Tensor) -> torch.Tensor:
    if slot.kind == "number":
        return torch.full((), slot.initial, dtype=slot_dtype(slot, values, p), device=p.device)
    if slot.kind == "zeros":
        zeros = torch.zeros_like(p, dtype=slot_dtype(slot, values, p), requires_grad=False)
        return zeros if slot.device is None else copy_for_slot(zeros, slot, values, p)
    return copy_for_slot(p, slot, values, p)


def _missing(chain: Chain, p: torch.Tensor, param_state: ParamState) -> ParamState:
    """Return the initial value of every slot that a parameter's state lacks."""
    return {
        keyed.key: _initial(keyed.slot, vars(keyed.wrapper), p) for keyed in chain.slots if keyed.key not in param_state
    }


def without_placeholders(chain: Chain, param_state: ParamState) -> ParamState:
    """Return a parameter's state without what only stands for entries of the base; the mark itself becomes 0."""
    if not param_state.get(PLACEHOLDER):
        return param_state
    return {**{k: v for k, v in param_state.items() if not chain.is_base_key(k)}, PLACEHOLDER: 0.0}


def is_incomplete(run: Run, chain: Chain, p: torch.Tensor) -> bool:
    """Return whether something is missing in a parameter's state, which its next update has to add."""
    if p in run.constructor_state:
        return True
    param_state = run.state.get(p)
    if param_state is None:
        return bool(chain.slots or chain.moment_slots or chain.resets)
    if any(keyed.key not in param_state for keyed in chain.slots):
        return True
    # dropped by a wrapper or by reset_state, and without a gradient since
    return bool(param_state.get(PLACEHOLDER) or (chain.resets and not any(map(chain.is_base_key, param_state))))


def find_incomplete(run: Run) -> None:
    """Find again which parameters' state lacks something; looks only at those that did before, if that is known."""
    known = None if run.incomplete is None else {id(p) for p in run.incomplete}
    if known is None or known:
        run.incomplete = [
            p
            for group in run.param_groups
            for p in group["params"]
            if (known is None or id(p) in known) and is_incomplete(run, run.structure.chain_of(group), p)
        ]
    run.state_size = len(run.state)


def collect_pending_state(update: Update) -> None:
    """Copy, before the base's update, what wrappers must keep of parameters whose state lacks it; change no state.

    For parameters that the base has not begun, that includes what wrappers have stored for them already.
    """
    run = update.run
    if run.state_size != len(run.state):
        run.invalidate()
    candidates = None if run.incomplete is None else run.incomplete
    if candidates is not None and not any(p.grad is not None for p in candidates):
        return
    among = None if candidates is None else {id(p) for p in candidates}
    for group in run.param_groups:
        chain = run.structure.chain_of(group)
        if among is None:
            run.validate_members(group)
        for p in group["params"]:
            if p.grad is None or (among is not None and id(p) not in among) or p in update.pending_state:
                continue
            param_state = without_placeholders(chain, run.state.get(p) or {})
            if group[TEMPLATE]:
                param_state = {key: value for key, value in param_state.items() if key in chain.early_keys}
            missing = _missing(chain, p, param_state)
            if not any(map(chain.is_base_key, param_state)):
                update.pending_state[p] = {**param_state, **missing}
            elif missing or _lacks_moments(chain, param_state):
                update.pending_state[p] = missing


def add_early_state(update: Update) -> None:
    """Give parameters with a gradient the state that a wrapper needs before the base's first update of them."""
    run = update.run
    for group in run.param_groups:
        if group[TEMPLATE]:
            # made for all parameters, also for those that never have a gradient
            remove_placeholders(run)
            break
    for group in run.param_groups:
        chain = run.structure.chain_of(group)
        for keyed in chain.slots if chain.early_keys else ():
            if not keyed.slot.early:
                continue
            for p in group["params"]:
                if p.grad is not None and keyed.key not in run.state.get(p, {}):
                    run.state[p][keyed.key] = _initial(keyed.slot, vars(keyed.wrapper), p)
                    run.incomplete = None


def add_state_of(run: Run, chain: Chain, wrapper: Wrapper, params: list[torch.Tensor]) -> None:
    """Give parameters what one wrapper keeps of them, if they have had no update yet: they did not move so far."""
    keyed_slots = [keyed for keyed in chain.slots if keyed.wrapper is wrapper]
    for p in params:
        missing = [keyed for keyed in keyed_slots if keyed.key not in run.state.get(p, {})]
        for keyed in missing:
            run.state[p][keyed.key] = _initial(keyed.slot, vars(wrapper), p)
        if missing and not any(map(chain.is_base_key, run.state[p])):
            run.state[p][PLACEHOLDER] = 1.0
        if missing:
            run.incomplete = None


def set_wrapper_state_aside(update: Update) -> None:
    """Take wrappers' entries out of `state[p]` where the base has none: the base itself makes its state there, next."""
    run = update.run
    for p, (chain, group) in _chain_and_group_of(run, update.pending_state).items():
        param_state = run.state.get(p)
        if param_state and chain.has_base_state(param_state):
            continue
        begun_before = run.state.pop(p, None)
        if begun_before:
            update.state_set_aside[p] = begun_before
        made = run.constructor_state.pop(p, None)
        if made is None and chain.name in run.constructor_chains:
            made = chain.constructor_state(group, p)
        if made:
            run.state[p] = made


def store_pending_state(update: Update) -> None:
    """Put wrappers' state into `state[p]`, after the base has made its own, with zeros for each of its moments."""
    for p, (chain, _) in _chain_and_group_of(update.run, update.pending_state).items():
        _store(update.run, chain, p, update.pending_state[p])
    update.pending_state = {}


def _store(run: Run, chain: Chain, p: torch.Tensor, values: ParamState) -> None:
    if not values and not run.state.get(p):
        return  # neither base nor wrapper keeps anything: no state at all, as for the bare base
    param_state = run.state[p]
    param_state.update(values)
    if chain.resets:  # all have the mark, because a distributed checkpoint needs the same keys for all
        param_state.setdefault(PLACEHOLDER, 0.0)
    else:
        param_state.pop(PLACEHOLDER, None)
    for key, _ in chain.moment_slots:
        _store_moments(chain, p, param_state, key)


def _chain_and_group_of(
    run: Run, params: dict[torch.Tensor, ParamState]
) -> dict[torch.Tensor, tuple[Chain, ParamGroup]]:
    """Return chain and group of each of some parameters."""
    return {
        p: (run.structure.chain_of(group), group)
        for group in (run.param_groups if params else ())
        for p in group["params"]
        if p in params
    }


def restore_wrapper_state(update: Update) -> None:
    """After a failed update: put the wrappers' entries back. The base's state and the weights are not undone."""
    run = update.run
    for p, (chain, _) in _chain_and_group_of(run, update.pending_state).items():
        # the base may have moved the parameter: the copy from before the step stays in force
        if run.state.get(p) or _has_moved(chain, p, update.pending_state[p]):
            _store(run, chain, p, update.pending_state[p])
        elif p in update.state_set_aside:
            run.state[p] = update.state_set_aside[p]


def _has_moved(chain: Chain, p: torch.Tensor, copies: ParamState) -> bool:
    """Return whether a parameter differs from what wrappers have copied of it."""
    kept = [copies[k.key] for k in chain.slots if k.slot.kind in ("anchor", "start") and k.key in copies]
    weights = local(p).detach()
    return any(not torch.equal(local(copy).to(weights.device), weights.to(copy.dtype)) for copy in kept)


def _lacks_moments(chain: Chain, param_state: ParamState) -> bool:
    """Return whether a checkpoint brought the base's moments without those that a wrapper keeps of them."""
    return any(
        not any(k.startswith(f"{key}.") for k in param_state if isinstance(k, str)) for key, _ in chain.moment_slots
    )


def _store_moments(chain: Chain, p: torch.Tensor, param_state: ParamState, key: str) -> None:
    """Begin a wrapper's copy of each of the base's moments with zeros."""
    for base_key, value in [(k, v) for k, v in param_state.items() if chain.is_base_key(k)]:
        if isinstance(value, list | dict):
            raise StepError(
                f"{key.split('.')[0]} cannot act on the moments of {type(chain.base).__name__}: "
                f"its state holds lists or dicts ({base_key}); use pullback_momentum='none'"
            )
        if is_moment(value, base_key, p):
            param_state.setdefault(f"{key}.{base_key}", torch.zeros_like(value))


def take_constructor_state(run: Run) -> None:
    """Take out what a base such as Adagrad puts into `state` when it is made; one that has stepped keeps its own."""
    # a base may keep numbers of its own beside the parameters' state
    states = {p: s for p, s in run.state.items() if isinstance(p, torch.Tensor) and isinstance(s, dict)}
    unstepped = [p for p, s in states.items() if "step" in s and not bool(s["step"])]
    for group in run.param_groups:
        chain = run.structure.chain_of(group)
        for p in group["params"]:
            if states.get(p) and chain.name not in run.constructor_chains:
                try:
                    made = chain.constructor_state(group, p)
                except Exception:  # a class from elsewhere may keep what it was made with for itself
                    break
                run.constructor_chains |= {chain.name} if made else set()
                break
    run.constructor_state = {p: run.state.pop(p) for p in unstepped}


# ---- placeholders


def is_template_step(run: Run) -> bool:
    """Return whether this `step()` is of a client that set `lr` to 0 on a stack without state, gradients all zero.

    Reads gradients from the device, but only if the state is empty and every rate is 0.
    """
    if run.state or not run.param_groups:
        return False
    for position, group in enumerate(run.param_groups):
        if group.get("lr") is None or float(group["lr"]) != 0.0 or not run.lr_set_by_client(position):
            return False
    gradients = [p.grad for group in run.param_groups for p in group["params"] if p.grad is not None]
    return bool(gradients) and not any(bool(gradient.any()) for gradient in gradients)


def add_placeholders(run: Run) -> None:
    """Fill the live state with placeholders, for a client that looks for its keys; nothing else changes."""
    for group in run.param_groups:
        chain, added = run.structure.chain_of(group), str(group[TEMPLATE]).split()[1:]
        for p in group["params"]:
            if p.grad is None:
                continue
            made, scratch_group, _ = chain.scratch_step(group, p)
            # a flattened checkpoint is read by the keys of the groups, to which a base may add some in its first step
            added += [key for key in scratch_group if key not in group and key not in added]
            group.update({key: scratch_group[key] for key in added if key not in group})
            _fill(chain, p, made)
            if made:
                run.state[p] = made
        group[TEMPLATE] = " ".join(["asked", *added])
    run.invalidate()


def _fill(chain: Chain, p: torch.Tensor, param_state: ParamState) -> None:
    """Complete what a scratch base made with the wrappers' own initial state."""
    param_state.update(_missing(chain, p, param_state))
    if chain.resets:
        param_state.setdefault(PLACEHOLDER, 0.0)
    for key, _ in chain.moment_slots:
        _store_moments(chain, p, param_state, key)


def remove_placeholders(run: Run, *, keep_early: bool = False) -> None:
    """Before a real update: forget what `add_placeholders` left, so that the base begins as if new."""
    for group in run.param_groups:
        if not group[TEMPLATE]:
            continue
        for added in str(group[TEMPLATE]).split()[1:]:
            group.pop(added, None)
        group[TEMPLATE] = ""
        early = run.structure.chain_of(group).early_keys if keep_early else frozenset()
        for p in group["params"]:
            kept = {key: value for key, value in run.state.pop(p, {}).items() if key in early}
            if kept:
                run.state[p] = kept
    run.invalidate()


def with_placeholders(run: Run, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict in which parameters that the base has not begun have placeholders; the live state stays.

    Nothing is added for a base that cannot step over zeros: an ordinary checkpoint is complete without.
    """
    state, groups = state_dict["state"], state_dict["param_groups"]
    filled: dict[Any, ParamState] = {}
    begun = False
    for group, live in zip(groups, run.param_groups, strict=True):
        chain = run.structure.chain_of(live)
        for i, p in zip(group["params"], live["params"], strict=True):
            param_state = state.get(i)
            if not param_state or not isinstance(param_state, dict):
                continue
            begun = begun or any(keyed.key in param_state and not keyed.slot.early for keyed in chain.slots)
            if any(map(chain.is_base_key, param_state)):
                begun = True
            elif chain.resets or chain.early_keys or param_state.get(PLACEHOLDER):
                filled[i] = {**param_state, **_scratch_state(chain, live, p)}
    early_only = not begun and run.structure.keeps_early_state
    for group, live in zip(groups, run.param_groups, strict=True):
        chain = run.structure.chain_of(live)
        for i, p in zip(group["params"], live["params"], strict=True):
            if i not in filled:
                continue
            if early_only:
                _fill(chain, p, filled[i])
            elif chain.resets or filled[i].get(PLACEHOLDER):
                filled[i][PLACEHOLDER] = 1.0
            else:
                del filled[i]
    if early_only and filled:
        groups = [{**group, TEMPLATE: group.get(TEMPLATE) or "made"} for group in groups]
    return {**state_dict, "state": {**state, **filled}, "param_groups": groups}


def _scratch_state(chain: Chain, group: ParamGroup, p: torch.Tensor) -> ParamState:
    try:
        return chain.scratch_step(group, p)[0]
    except Exception:  # a class from elsewhere may want other gradients, or more than one parameter
        return {}
