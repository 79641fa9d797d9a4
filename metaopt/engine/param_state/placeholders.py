"""Placeholders: entries of a state that show which keys it will have, in place of what the base has not made yet.

A distributed checkpoint needs the same keys for every parameter. What the base has yet to make is therefore what a
scratch base makes of zeros. Placeholders are in the copy that `state_dict()` returns, and in the live state only if a
client asked for them by its template step, a `step()` with rates and gradients of 0; the next update removes them.
"""

from typing import Any

import torch

from metaopt.engine.chain import PLACEHOLDER, Chain, ParamGroup, ParamState
from metaopt.engine.param_state.scratch import scratch_step
from metaopt.engine.param_state.slot_values import add_zero_moments, missing_values
from metaopt.engine.run.entries import TEMPLATE
from metaopt.engine.run.run import Run


def without_placeholders(chain: Chain, param_state: ParamState) -> ParamState:
    """Return a parameter's state without what only stands for entries of the base; the mark itself becomes 0."""
    if not param_state.get(PLACEHOLDER):
        return param_state
    return {**{k: v for k, v in param_state.items() if not chain.is_base_key(k)}, PLACEHOLDER: 0.0}


def is_template_step(run: Run) -> bool:
    """Return whether this `step()` is of a client that set `lr` to 0 on a stack without state, gradients all zero.

    Reads gradients from the device, but only if the state is empty and every rate is 0; of a run that goes on so, as a
    base without state may, once. A rate on a device is not read: no such client sets one.
    """
    if run.state or not run.param_groups:
        return False
    for position, group in enumerate(run.param_groups):
        if not _is_zero(group.get("lr")) or not run.lr_set_by_client(position):
            run.trains_at_zero = False
            return False
    if run.trains_at_zero:
        return False
    gradients = [p.grad for group in run.param_groups for p in group["params"] if p.grad is not None]
    run.trains_at_zero = any(bool(gradient.any()) for gradient in gradients)
    return bool(gradients) and not run.trains_at_zero


def _is_zero(rate: Any) -> bool:
    """Return whether a rate is 0, as far as that is known without waiting for a device."""
    return rate is not None and (not isinstance(rate, torch.Tensor) or rate.is_cpu) and float(rate) == 0.0


def add_placeholders(run: Run) -> None:
    """Fill the live state with placeholders, for a client that looks for its keys; nothing else changes."""
    for group in run.param_groups:
        chain, added = run.structure.chain_of(group), str(group[TEMPLATE]).split()[1:]
        for p in group["params"]:
            if p.grad is None:
                continue
            made, scratch_group, _ = scratch_step(chain, group, p)
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
    param_state.update(missing_values(chain, p, param_state))
    if chain.resets:
        param_state.setdefault(PLACEHOLDER, 0.0)
    for key, _ in chain.moment_slots:
        add_zero_moments(chain, p, param_state, key)


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
    may_fill = any(chain.resets or chain.early_keys for chain in run.structure.chains)
    if not may_fill and not any(PLACEHOLDER in entries for entries in state.values() if isinstance(entries, dict)):
        return {**state_dict, "state": {**state}}  # of most stacks: no parameter needs a closer look
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
        return scratch_step(chain, group, p)[0]
    except Exception:  # a class from elsewhere may want other gradients, or more than one parameter
        return {}
