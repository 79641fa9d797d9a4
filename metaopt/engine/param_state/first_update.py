"""The first update of a parameter: what wrappers keep of it is copied before the base moves it, and stored after.

A base such as Adam makes its state only if `state[p]` is empty. So the wrappers' tensors wait in
`Update.pending_state`, also those that they had already, after a reset for instance. `Update.state_set_aside` has what
was in `state[p]`, for an update that fails.
"""

import torch

from metaopt.distributed.shards import local
from metaopt.engine.chain import PLACEHOLDER, Chain, ParamGroup, ParamState
from metaopt.engine.param_state.placeholders import remove_placeholders, without_placeholders
from metaopt.engine.param_state.scratch import constructor_state
from metaopt.engine.param_state.slot_values import add_zero_moments, first_value, missing_values
from metaopt.engine.run.entries import TEMPLATE
from metaopt.engine.run.groups import validate_members
from metaopt.engine.run.run import Run
from metaopt.engine.update.update import Update
from metaopt.wrapper import Wrapper


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
    """Find again which parameters' state lacks something: among those in `run.incomplete`, or all if that is None."""
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
    candidates = run.incomplete
    if candidates is not None and not any(p.grad is not None for p in candidates):
        return
    among = None if candidates is None else {id(p) for p in candidates}
    for group in run.param_groups:
        chain = run.structure.chain_of(group)
        if among is None:
            validate_members(run, group)
        for p in group["params"]:
            if p.grad is None or (among is not None and id(p) not in among) or p in update.pending_state:
                continue
            param_state = without_placeholders(chain, run.state.get(p) or {})
            if group[TEMPLATE]:
                param_state = {key: value for key, value in param_state.items() if key in chain.early_keys}
            missing = missing_values(chain, p, param_state)
            if not any(map(chain.is_base_key, param_state)):
                update.pending_state[p] = {**param_state, **missing}
            elif missing or _lacks_moments(chain, param_state):
                update.pending_state[p] = missing


def _lacks_moments(chain: Chain, param_state: ParamState) -> bool:
    """Return whether a checkpoint brought the base's moments without those that a wrapper keeps of them."""
    return any(
        not any(k.startswith(f"{key}.") for k in param_state if isinstance(k, str)) for key, _ in chain.moment_slots
    )


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
                    run.state[p][keyed.key] = first_value(keyed.slot, vars(keyed.wrapper), p)
                    run.incomplete = None


def add_state_of(run: Run, chain: Chain, wrapper: Wrapper, params: list[torch.Tensor]) -> None:
    """Give parameters what one wrapper keeps of them, if they have had no update yet: they did not move so far."""
    keyed_slots = [keyed for keyed in chain.slots if keyed.wrapper is wrapper]
    for p in params:
        missing = [keyed for keyed in keyed_slots if keyed.key not in run.state.get(p, {})]
        for keyed in missing:
            run.state[p][keyed.key] = first_value(keyed.slot, vars(wrapper), p)
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
            made = constructor_state(chain, group, p)
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
        add_zero_moments(chain, p, param_state, key)


def restore_wrapper_state(update: Update) -> None:
    """After a failed update: put the wrappers' entries back. The base's state and the weights are not undone."""
    run = update.run
    for p, (chain, _) in _chain_and_group_of(run, update.pending_state).items():
        # the base may have begun or moved the parameter: the copy from before the step stays in force
        before = update.state_set_aside.get(p) or run.state.get(p) or {}
        copies = {key: value for key, value in update.pending_state[p].items() if key not in before}
        if chain.has_base_state(run.state.get(p) or {}) or _has_moved(chain, p, copies):
            _store(run, chain, p, update.pending_state[p])
        elif p in update.state_set_aside:
            run.state[p] = update.state_set_aside[p]
    update.pending_state, update.state_set_aside = {}, {}  # a traceback that is kept holds the update


def _has_moved(chain: Chain, p: torch.Tensor, copies: ParamState) -> bool:
    """Return whether a parameter differs from what wrappers have copied of it in this update."""
    kept = [copies[k.key] for k in chain.slots if k.slot.kind in ("anchor", "start") and k.key in copies]
    weights = local(p).detach()
    return any(not torch.equal(local(copy).to(weights.device), weights.to(copy.dtype)) for copy in kept)


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


def take_constructor_state(run: Run) -> None:
    """Take out what a base such as Adagrad puts into `state` when it is made; one that has stepped keeps its own."""
    # a base may keep numbers of its own beside the parameters' state
    states = {p: s for p, s in run.state.items() if isinstance(p, torch.Tensor) and isinstance(s, dict)}
    unstepped = [p for p, s in states.items() if "step" in s and not bool(s["step"])]
    for group in run.param_groups if states else ():
        chain = run.structure.chain_of(group)
        for p in group["params"]:
            if states.get(p) and chain.name not in run.constructor_chains:
                try:
                    made = constructor_state(chain, group, p)
                except Exception:  # a class from elsewhere may keep what it was made with for itself
                    break
                run.constructor_chains |= {chain.name} if made else set()
                break
    run.constructor_state = {p: run.state.pop(p) for p in unstepped}
