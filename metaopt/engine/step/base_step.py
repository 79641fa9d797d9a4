"""How a base is stepped: by torch's kernel or the library, by its own `step()`, or block by block for `on_update`.

It changes the weights and the base's state. Which of the ways it takes is decided at each update, in `step_bases`,
`_step_directly` and `_step_in_blocks`; a group that a fused kernel cannot update loses `fused` for good
(`turn_off_...`).
"""

from operator import attrgetter
from typing import Any

import torch

from metaopt.engine.chain import PLACEHOLDER, Chain, ParamGroup
from metaopt.engine.fused.lists import LARGE, MANY, FusedLists, fits_kernel, lists_for
from metaopt.engine.fused.postponed import postponed_step
from metaopt.engine.fused.probes import has_fused_kernel
from metaopt.engine.fused.recorded import rules_on_update
from metaopt.engine.run.run import Run
from metaopt.engine.step.hooks import call_on_update, call_on_update_of_chain, is_due, keep_weights_for_on_update
from metaopt.engine.update.change import Params
from metaopt.engine.update.update import Update
from metaopt.engine.views.blocks import blocks_of
from metaopt.misuse.base import warn_of_kernel
from metaopt.programs import kernels
from metaopt.wrapper import Closure, Wrapper


def step_bases(update: Update, closure: tuple[Closure, ...], keywords: dict[str, Any]) -> Any:
    """Step every base: as a whole, or block by block with the wrappers on the update; return what the only one does."""
    structure = update.run.structure
    if structure.multi_base is not None:
        structure.multi_base.assign_groups()
    returned = None
    for chain in structure.chains:
        # none of the bases that step in blocks takes keywords: stepped as a whole, they refuse them
        if chain.leading_on_update and chain.is_elementwise and not chain.needs_weights_before and not keywords:
            for group in chain.groups_in(update.run.param_groups):
                _step_in_blocks(update, chain, group)
        else:
            if chain.leading_on_update and not chain.needs_weights_before:
                keep_weights_for_on_update(update, chain)
            if keywords or not _step_directly(update, chain):
                returned = _step_whole(update, chain, closure, keywords)
            call_on_update_of_chain(update, chain)
        if update.postponed and not structure.acts_behind:
            update.make_postponed()
    return returned


def _step_whole(update: Update, chain: Chain, closure: tuple[Closure, ...], keywords: dict[str, Any]) -> Any:
    """Call the base's own step; return what it returns."""
    turn_off_kernel_for_gradients(update, chain)
    late = set() if keywords else _late_momentum(update, chain)
    if not late:
        return chain.step(*closure, **keywords)
    for group in chain.groups_in(update.run.param_groups):
        _step_on(chain, group, update.params_of(group), late)
    return None


def _step_directly(update: Update, chain: Chain) -> bool:
    """Update all groups of a base by torch's kernel, now, or by the library, later; return False where neither can."""
    if chain.fused_state is None:
        return False
    found = []
    run = update.run
    edition = run.known_entries.look(chain.base.state)
    for group in chain.groups_in(run.param_groups):
        params, gradients = update.params_and_grads(group)
        lists = lists_for(run.fused_lists, chain, group, params, update.uniform_dtype(group), edition)
        if lists is not None:
            found.append((lists, group, params, gradients))
        elif params:
            return False
    scale = vars(chain.base).get("grad_scale")
    # what comes right after a first update, or looks at the update itself, reads the weights at once
    may_postpone = kernels() is not None and not (update.pending_state or update.run.incomplete is None)
    for lists, group, params, gradients in found:
        postponed = None
        if may_postpone and not chain.needs_weights_before and _gains_by_postponing(chain, group, lists, scale):
            postponed = postponed_step(lists, group, params, gradients, scale)
        if postponed is None:
            lists.step(group, params, gradients, scale)
        else:
            update.postponed[id(group)] = postponed
    return True


def _postpone_with_rules(update: Update, group: ParamGroup, lists: FusedLists, wrappers: list[Wrapper]) -> bool:
    """Put the base's step off if all that the wrappers do to the update are rules; return False if it is not."""
    # also right after a load: a resumed run adds sums up as the one that was not interrupted
    if kernels() is None or update.pending_state:
        return False
    applied = [(wrapper, rules_on_update(wrapper, group, update.updates_before)) for wrapper in wrappers]
    if any(rules is None for _, rules in applied):
        return False
    scale = vars(update.run.structure.chain_of(group).base).get("grad_scale")
    postponed = postponed_step(lists, group, *update.params_and_grads(group), scale)
    if postponed is None:
        return False
    for wrapper, rules in applied:
        for rule, numbers in rules or ():
            if not postponed.add(wrapper, rule, numbers, update.run.state, on_update=True):
                return False
    update.postponed[id(group)] = postponed
    return True


def _gains_by_postponing(chain: Chain, group: ParamGroup, lists: FusedLists, scale: Any) -> bool:
    """Return whether the library is faster: it saves passes over memory, and calls for each of many tensors.

    A small update of a few tensors alone is faster by torch's kernel.
    """
    if len(lists.sizes) >= MANY or (scale is not None and lists.elements > LARGE):
        return True
    return any(wrapper.has_rules and is_due(wrapper, group, counted=False) for wrapper in chain.written_behind)


def _step_in_blocks(update: Update, chain: Chain, group: ParamGroup) -> None:
    """Step the base and let the wrappers on the update act, one block of parameters after the other.

    A block stays in the cache, and only its weights are kept twice; a larger parameter is a block of its own.
    """
    params, gradients = update.params_and_grads(group)
    lists = lists_for(update.run.fused_lists, chain, group, params, update.uniform_dtype(group))
    if lists is None:
        turn_off_kernel_for_gradients(update, chain)
    late = _late_momentum(update, chain) if lists is None else set()
    wrappers = [w for w in chain.leading_on_update if is_due(w, group, counted=False)]
    if not wrappers:
        if lists is None:
            _step_on(chain, group, params, late)
        else:
            lists.step(group, params, gradients, vars(chain.base).get("grad_scale"))
        return
    if lists is not None and _postpone_with_rules(update, group, lists, wrappers):
        return
    begin = 0
    copies: list[torch.Tensor] = []
    try:
        for block in blocks_of(params):
            part = slice(begin, begin + len(block))
            begin = part.stop
            if lists is not None and block[0].element_size() >= 4:
                # the kernel moves copies: what it adds to the weights is known before they move
                copies = update.change.copies_to_move(block)
                lists.step(group, copies, gradients[part], vars(chain.base).get("grad_scale"), part)
                update.change.take_copies(block, copies)
            else:
                update.change.keep_block(block)
                _step_on(chain, group, block, late)
            call_on_update(update, group, wrappers, block)
            update.change.forget(block)
    except BaseException:
        del copies, gradients  # the error's traceback holds what this function holds
        raise


def _step_on(chain: Chain, group: ParamGroup, params: Params, late: set[int]) -> None:
    """Step the base over some parameters of a group, those that begin their momentum late apart from the others."""
    for part in ([p for p in params if id(p) not in late], [p for p in params if id(p) in late]):
        if part:
            chain.step_on(group, part)


def _late_momentum(update: Update, chain: Chain) -> set[int]:
    """Return the parameters that torch's fused SGD has to step apart: it wants all momentum buffers, or none."""
    if type(chain.base) is not torch.optim.SGD:
        return set()
    run = update.run
    late: set[int] = set()
    for group in chain.groups_in(run.base.param_groups):
        if not (group.get("fused") and group["momentum"]):
            continue
        lacking = run.without_momentum.get(id(group))
        if lacking is None:
            states = [(p, run.state.get(p, {})) for p in group["params"]]
            # one that only shows which keys there will be goes when the base begins the parameter
            lacking = [p for p, held in states if held.get("momentum_buffer") is None or held.get(PLACEHOLDER)]
            run.without_momentum[id(group)] = lacking
        begin = [p for p in lacking if p.grad is not None]
        if begin:
            del run.without_momentum[id(group)]
            if any(p.grad is not None and not any(p is b for b in begin) for p in group["params"]):
                late.update(map(id, begin))
    return late


def turn_off_unfit_kernels(run: Run) -> None:
    """Turn the fused kernel off for groups whose parameters it cannot update, if it was our choice.

    Parameters may have another dtype or be DTensors since construction.
    """
    for group in run.base.param_groups:
        chain = run.structure.chain_of(group)
        if chain.fused_by_default and group.get("fused") and not has_fused_kernel(type(chain.base), group["params"]):
            group["fused"] = None


def turn_off_kernel_for_gradients(update: Update, chain: Chain) -> None:
    """Turn the fused kernel off for groups whose gradients now are not what it can read; see `warn_of_kernel`."""
    for group in chain.groups_in(update.run.param_groups):
        chosen = chain.fused_by_default or (group["params"] and group["params"][0].is_cpu)
        if not chosen or not group.get("fused") or update.uniform_dtype(group) is not None:
            continue
        if not fits_kernel(*update.params_and_grads(group)):
            if not chain.fused_by_default:
                if any(map(attrgetter("is_sparse"), update.params_and_grads(group)[1])):
                    continue  # torch refuses them itself
                warn_of_kernel(chain.base)
            group["fused"] = None


def turn_off_kernel_for_late_momentum(update: Update, chain: Chain) -> None:
    """Turn the fused kernel of SGD off, if it was our choice, where the base cannot be stepped in two parts."""
    if chain.fused_by_default and _late_momentum(update, chain):
        for group in chain.groups_in(update.run.param_groups):
            group["fused"] = None
        divisor = vars(chain.base).pop("grad_scale", None)
        if divisor is not None:  # was meant for the kernel
            update.add_scale(chain, divisor.reciprocal())
            update.apply_scale(chain)
