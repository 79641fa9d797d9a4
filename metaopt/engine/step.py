"""The order of one update: evaluate, filter gradients, step the base, let the wrappers behind it act."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch

from metaopt.engine import averages
from metaopt.engine.chain import PLACEHOLDER, Chain, ParamGroup, has_fused_kernel
from metaopt.engine.fused.lists import LARGE, FusedLists, fits_kernel, lists_for
from metaopt.engine.fused.postponed import postponed_step
from metaopt.engine.param_state import first_update, placeholders
from metaopt.engine.run.entries import AVERAGE_SHOWN, TEMPLATE, UPDATES
from metaopt.engine.run.groups import adopt_groups
from metaopt.engine.run.run import Run
from metaopt.engine.structure import PlacedWrapper
from metaopt.engine.update import Evaluation, Params, Update, blocks_of
from metaopt.engine.views import GroupsView, GroupView, block_views_of, gradient_norm, groups_of, trained, views_of
from metaopt.errors import StepError
from metaopt.group import Group
from metaopt.misuse.base import warn_of_kernel
from metaopt.programs import kernels
from metaopt.scheduled_values import points_of
from metaopt.wrapper import Closure, Wrapper


def step(run: Run, closure: Closure | None, keywords: dict[str, Any]) -> Any:
    """Make one update, or none; return the closure's loss, or what the base's step returns without a closure."""
    evaluation = begin(run, closure)
    if evaluation is None:
        return None
    if evaluation.update is None:
        return evaluation.loss
    try:
        returned = step_bases(evaluation.update, evaluation.closure_for_base(), keywords)
    except BaseException as error:
        replaced = bool(evaluation.update.with_replaced_grads)
        abandon(evaluation.update)
        if replaced and isinstance(error, RuntimeError) and "does not require grad" in str(error):
            label = run.structure.on_gradients[0].wrapper.label
            raise StepError(
                f"{type(run.base).__name__} differentiates through the gradients, and {label} replaces them by others "
                f"that have no history: leave it out"
            ) from error
        raise
    finish(evaluation.update, evaluation.loss)
    return returned if closure is None else evaluation.loss


def begin(run: Run, closure: Closure | None) -> Evaluation | None:
    """Do all that comes before the base's step; return the evaluation, without an update if none is due.

    None: a client stepped with a rate of 0 and gradients of 0 to see the keys of the state, as distributed checkpoints
    do. It found placeholders, and no update was made. A feature that is not in use costs the test of one
    flag, so that a stack without wrappers is as fast as its base.
    """
    run.skipped = None
    structure = run.structure
    adopt_groups(run)
    first = run.base.param_groups[0]
    if first[AVERAGE_SHOWN]:
        averages.before_step(run)
    if not run.base.state and closure is None and placeholders.is_template_step(run):
        placeholders.add_placeholders(run)
        return None
    took_weights = run.exchange is not None and run.exchange.join()
    if run.left_out is not None:
        run.left_out = run.left_out.look(run.param_groups)
    if run.has_schedules:
        for scheduled, group in zip(run.scheduled, run.base.param_groups, strict=True):
            scheduled.raise_if_changed(group)
    update = Update(run, is_logged=run.metrics.wanted(first[UPDATES] + 1))
    update.step_weight, run.step_weight = run.step_weight, 1.0
    evaluation = Evaluation(update, closure, filter_gradients)
    if took_weights and closure is None:
        return _skip(evaluation, "took the weights of the other replicas")
    if closure is not None or ((structure.needs_closure or structure.around) and not run.flushing):
        try:
            evaluation.evaluate(
                lambda wrapper, inner: wrapper.around(inner, GroupsView(update, PlacedWrapper(wrapper, None)))
            )
            if closure is not None and structure.loss_observers:
                _observe_loss(update, evaluation.with_gradients)
        except BaseException:
            abandon(update)
            raise
    try:
        if run.second_clip is not None:
            run.second_clip = run.second_clip.look(run.base.param_groups)
        if not any(update.params_and_grads(group)[0] for group in run.base.param_groups) and not run.flushing:
            return _skip(evaluation, "no gradients")
        if structure.keeps_early_state:
            first_update.add_early_state(update)
        first_update.collect_pending_state(update)
        if structure.on_gradients or structure.gradient_observers or update.is_logged:
            filter_gradients(update)
            if update.skip_reason is not None:
                update.clean_up()
                return _skip(evaluation, update.skip_reason)
            if update.with_replaced_grads:  # some had no gradient before
                first_update.collect_pending_state(update)
        _prepare_base(update)
    except BaseException:
        abandon(update)
        raise
    return evaluation


def _skip(evaluation: Evaluation, reason: str) -> Evaluation:
    """End a step that makes no update: no count, schedule or average advances; other replicas are not kept waiting."""
    run = evaluation.run
    run.skipped = reason
    if run.exchange is not None and evaluation.update is not None:
        run.exchange.take_part(evaluation.update)
    if evaluation.update is not None and evaluation.update.accumulates:
        _measure_loss(run, evaluation.loss)
        run.metrics.gather_step()
    else:
        run.metrics.drop_update(gathered=evaluation.update is not None and bool(evaluation.update.with_replaced_grads))
    evaluation.update = None
    return evaluation


def abandon(update: Update) -> None:
    """Leave an update that failed: wrappers' entries and counters return, nothing measured counts."""
    for group, key, before in reversed(update.counters_before):
        group[key] = before
    update.run.metrics.drop_update()
    first_update.restore_wrapper_state(update)
    update.run.invalidate()
    update.clean_up()


# ---- before the base


def filter_gradients(update: Update) -> None:
    """Let the wrappers on gradients act, once per evaluation of the loss, until one of them skips the update."""
    run = update.run
    update.skip_reason = None
    update.pending_scale.clear()
    _coalesce(update)
    if update.is_logged and not run.has_zero_shard:
        run.metrics.measure("train/grad_norm", gradient_norm(update, run.structure.chains, run.param_groups))
    if run.structure.gradient_observers:
        _observe_gradients(update, gathered=False)
    for placed in run.structure.on_gradients:
        groups = groups_of(update, placed)
        if placed.chain is not None and not any(update.params_and_grads(group)[0] for group in groups):
            continue
        if run.flushing and not placed.wrapper.spans_steps and not any(map(update.params_of, groups)):
            continue
        view = GroupsView(update, placed, groups)
        placed.wrapper.on_gradients(view)
        view.write_back()
        if update.skip_reason is not None:
            update.accumulates = placed.wrapper.spans_steps
            return
        if placed.wrapper.spans_steps and run.structure.gradient_observers:
            _observe_gradients(update, gathered=True)


def _coalesce(update: Update) -> None:
    """Add up the rows that a sparse gradient holds twice: an embedding leaves a row that it looked up twice as two."""
    for group in update.run.base.param_groups:
        members, gradients = update.params_and_grads(group)
        if any(map(attrgetter("is_sparse"), gradients)):
            for p, gradient in zip(members, gradients, strict=True):
                if gradient.is_sparse and not gradient.is_coalesced():
                    p.grad = gradient.coalesce()
            update.gradients_changed()


def _prepare_base(update: Update) -> None:
    run, structure = update.run, update.run.structure
    if run.base.param_groups[0][TEMPLATE]:
        placeholders.remove_placeholders(run, keep_early=True)
    if update.pending_state or run.incomplete is None:
        _leave_unfit_kernels(run)
        # a wrapper may have taken gradients away since
        update.pending_state = {p: values for p, values in update.pending_state.items() if p.grad is not None}
        first_update.set_wrapper_state_aside(update)
    for placed in structure.before_update:
        for group in _due(update, placed, counted=False):
            _call(placed.wrapper.before_update, views_of(update, group, placed.wrapper, update.params_of(group)))
    if structure.needs_weights_before or structure.changes_updates:
        # a base may take gradients away inside its step: which parameters it updates is known only now
        update.params_by_group = {id(group): update.params_of(group) for group in run.param_groups}
        for group in run.param_groups:
            if structure.chain_of(group).needs_weights_before:
                update.keep_weights(update.params_of(group))
    if structure.observers and update.is_logged:
        update.keep_weights_for_observers()
    for chain in list(update.pending_scale):
        _leave_kernel_for_gradients(update, chain)
        update.fold_scale(chain)


def _leave_unfit_kernels(run: Run) -> None:
    """Turn the fused kernel off for groups whose parameters it cannot update, if it was our choice.

    Parameters may have another dtype or be DTensors since construction.
    """
    for group in run.base.param_groups:
        chain = run.structure.chain_of(group)
        if chain.fused_by_default and group.get("fused") and not has_fused_kernel(type(chain.base), group["params"]):
            group["fused"] = None


def _leave_kernel_for_gradients(update: Update, chain: Chain) -> None:
    """Turn the fused kernel off for groups whose gradients now are not what it can read; see `warn_of_kernel`."""
    for group in chain.groups_in(update.run.param_groups):
        chosen = chain.fused_by_default or (group["params"] and group["params"][0].is_cpu)
        if chosen and group.get("fused") and not fits_kernel(*update.params_and_grads(group)):
            if not chain.fused_by_default:
                if any(map(attrgetter("is_sparse"), update.params_and_grads(group)[1])):
                    continue  # torch refuses them itself
                warn_of_kernel(chain.base)
            group["fused"] = None


# ---- the base


def step_bases(update: Update, closure: tuple[Closure, ...], keywords: dict[str, Any]) -> Any:
    """Step every base: as a whole, or block by block with the wrappers on the update; return what the only one does."""
    structure = update.run.structure
    if structure.multi_base is not None:
        structure.multi_base.assign_groups()
    returned = None
    for chain in structure.chains:
        # none of the bases that step in blocks takes keywords: stepped as a whole, they refuse them
        if chain.leading_on_update and chain.steps_in_blocks and not chain.needs_weights_before and not keywords:
            for group in chain.groups_in(update.run.param_groups):
                _step_in_blocks(update, chain, group)
        else:
            if chain.leading_on_update and not chain.needs_weights_before:
                keep_due_weights(update, chain)
            if keywords or not _step_directly(update, chain):
                returned = _step_whole(update, chain, closure, keywords)
            change_updates(update, chain)
        if update.postponed and not structure.acts_behind:
            update.make_postponed()
    return returned


def _step_whole(update: Update, chain: Chain, closure: tuple[Closure, ...], keywords: dict[str, Any]) -> Any:
    """Call the base's own step; return what it returns."""
    _leave_kernel_for_gradients(update, chain)
    late = set() if keywords else _late_momentum(update, chain)
    if not late:
        return chain.step(*closure, **keywords)
    for group in chain.groups_in(update.run.param_groups):
        _step_on(chain, group, update.params_of(group), late)
    return None


def _step_directly(update: Update, chain: Chain) -> bool:
    """Update all groups of a base by torch's fused kernel, without its `step()`; return False where that cannot be."""
    if chain.fused_state is None:
        return False
    found = []
    for group in chain.groups_in(update.run.param_groups):
        members, gradients = update.params_and_grads(group)
        lists = lists_for(update.run.fused_lists, chain, group, members, gradients)
        if lists is not None:
            found.append((lists, group, members, gradients))
        elif members:
            return False
    scale = vars(chain.base).get("grad_scale")
    # what comes right after a first update, or looks at the update itself, reads the weights at once
    may_postpone = kernels() is not None and not (update.pending_state or update.run.incomplete is None)
    for lists, group, members, gradients in found:
        postponed = None
        if may_postpone and not chain.needs_weights_before and _gains_by_postponing(chain, group, lists, scale):
            postponed = postponed_step(lists, group, members, gradients, scale)
        if postponed is None:
            lists.step(group, members, gradients, scale)
        else:
            update.postponed[id(group)] = postponed
    return True


def _gains_by_postponing(chain: Chain, group: ParamGroup, lists: FusedLists, scale: Any) -> bool:
    """Return whether the library saves a pass over memory; a small update alone is faster by torch's kernel."""
    if scale is not None and lists.elements > LARGE:
        return True
    return any(wrapper.has_rules and _is_due(wrapper, group, counted=False) for wrapper in chain.written_behind)


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


def _step_on(chain: Chain, group: ParamGroup, members: Params, late: set[int]) -> None:
    """Step the base over some parameters of a group, those that begin their momentum late apart from the others."""
    for part in ([p for p in members if id(p) not in late], [p for p in members if id(p) in late]):
        if part:
            chain.step_on(group, part)


def _step_in_blocks(update: Update, chain: Chain, group: ParamGroup) -> None:
    """Step the base and let the wrappers on the update act, one block of parameters after the other.

    A block stays in the cache, and only its weights are kept twice.
    """
    members, gradients = update.params_and_grads(group)
    lists = lists_for(update.run.fused_lists, chain, group, members, gradients)
    if lists is None:
        _leave_kernel_for_gradients(update, chain)
    late = _late_momentum(update, chain) if lists is None else set()
    wrappers = [w for w in chain.leading_on_update if _is_due(w, group, counted=False)]
    if not wrappers:
        if lists is None:
            _step_on(chain, group, members, late)
        else:
            lists.step(group, members, gradients, vars(chain.base).get("grad_scale"))
        return
    begin = 0
    for block in blocks_of(members):
        part = slice(begin, begin + len(block))
        begin = part.stop
        if lists is not None and block[0].element_size() >= 4:
            # the kernel moves copies: what it adds to the weights is known before they move
            copies = update.copies_to_move(block)
            lists.step(group, copies, gradients[part], vars(chain.base).get("grad_scale"), part)
            update.take_change_of_copies(block, copies)
        else:
            update.keep_block(block)
            _step_on(chain, group, block, late)
        _change(update, group, wrappers, block)
        update.forget_change(block)


def keep_due_weights(update: Update, chain: Chain) -> None:
    for group in chain.groups_in(update.run.param_groups):
        if any(_is_due(wrapper, group, counted=False) for wrapper in chain.leading_on_update):
            update.keep_weights(update.params_of(group))


def change_updates(update: Update, chain: Chain) -> None:
    """Let the wrappers act on the update of a base that was stepped as a whole."""
    for group in chain.groups_in(update.run.param_groups) if chain.leading_on_update else ():
        wrappers = [w for w in chain.leading_on_update if _is_due(w, group, counted=False)]
        if wrappers:
            _change(update, group, wrappers, update.params_of(group))
            if not chain.needs_weights_before:
                update.forget_change(update.params_of(group))


def _change(update: Update, group: ParamGroup, wrappers: list[Wrapper], members: Params) -> None:
    """Let wrappers change what is added to some parameters, in written order, and add it."""
    update.return_to_weights_before(members)
    for wrapper in wrappers:
        _call(wrapper.on_update, block_views_of(update, group, wrapper, members, updates=update.updates_before))
    update.apply_change(members)


# ---- behind the base


def finish(update: Update, loss: Any) -> None:
    """Do all that comes after the base's step."""
    run = update.run
    # a torch scheduler bound to the base before it was wrapped looks here
    run.base._opt_called = True  # type: ignore[attr-defined]
    try:
        # the base has made its update: it counts, whatever fails from here on
        for group in run.base.param_groups:
            group[UPDATES] += 1
        if update.pending_state or run.incomplete is None:
            first_update.store_pending_state(update)
            first_update.find_incomplete(run)
            run.watch_16_bits()
        run.state_size = len(run.base.state)
        if run.exchange is not None:
            run.exchange.count_step()
        for placed in run.structure.acts_behind:
            _act_behind(update, placed)
        update.make_postponed()
        if run.still_watch is not None:
            run.still_watch = run.still_watch.look(run.base.state, run.updates)
        if run.structure.observers:
            _observe(update)
        _measure(update, loss)
    except BaseException:
        run.metrics.drop_update()
        update.make_postponed()
        raise
    finally:
        update.clean_up()
        if run.has_schedules:
            run.write_schedules()
    run.metrics.end_update(run.updates)


def _observe(update: Update) -> None:
    """Let the parts that only look see a logged update, and those that look ahead the one before it."""
    run = update.run
    if update.is_logged:
        update.begin_observing()
    for placed in run.structure.observers:
        ahead = placed.wrapper.looks_ahead() and run.metrics.wanted(run.updates + 1)
        groups = groups_of(update, placed)
        if (update.is_logged or ahead) and any(map(update.params_of, groups)):
            view = GroupsView(update, placed, groups)
            placed.wrapper.observe(view)
            view.write_back()
    update.change_for_observers = None


def _observe_gradients(update: Update, *, gathered: bool) -> None:
    for placed in update.run.structure.gradient_observers:
        groups = groups_of(update, placed)
        if any(update.params_and_grads(group)[0] for group in groups):
            placed.wrapper.observe_gradients(GroupsView(update, placed, groups), gathered=gathered)


def _observe_loss(update: Update, closure: Closure) -> None:
    for placed in update.run.structure.loss_observers:
        placed.wrapper.observe_loss(closure, GroupsView(update, placed))


def _act_behind(update: Update, placed: PlacedWrapper) -> None:
    wrapper, hooks = placed.wrapper, placed.wrapper.implemented_hooks()
    if update.run.exchange is not None and wrapper.takes_means:
        update.run.exchange.act(update, placed)
        return
    due = _due(update, placed, counted=True)
    if not due:
        return
    if hooks & {"on_update", "after_updates"} or not wrapper.has_rules:
        update.make_postponed()
    if "on_update" in hooks:
        for group in due:
            if wrapper not in update.run.structure.chain_of(group).leading_on_update:
                _change_later(update, group, wrapper)
    # a base of a partition may have had no gradient
    if "after_updates" in hooks and any(update.params_of(group) for group in due):
        view = GroupsView(update, placed, due)
        wrapper.after_updates(view)
        view.write_back()
        for group in due:
            _follow(update, group, wrapper, update.apply_written_change(update.params_of(group)))
    if "after_update" in hooks:
        for group in due:
            members = trained(update, group, wrapper)
            cut = views_of if id(group) in update.postponed else block_views_of
            _call(wrapper.after_update, cut(update, group, wrapper, members))


def _change_later(update: Update, group: ParamGroup, wrapper: Wrapper) -> None:
    """Let a wrapper change the update after others have moved the weights: their moves are part of it."""
    members = update.params_of(group)
    try:
        _change(update, group, [wrapper], members)
    except BaseException:
        # the update counts already: it must not be taken back from the weights
        update.apply_change([p for p in members if p in update.unapplied])
        raise
    _follow(update, group, wrapper, members)


def _follow(update: Update, group: ParamGroup, wrapper: Wrapper, members: Params) -> None:
    """Let anchors nearer the base follow the weights that a wrapper has moved."""
    for view in views_of(update, group, wrapper, members):
        view.move_inner_anchors()


def _due(update: Update, placed: PlacedWrapper, *, counted: bool) -> list[ParamGroup]:
    return [group for group in groups_of(update, placed) if _is_due(placed.wrapper, group, counted=counted)]


def _is_due(wrapper: Wrapper, group: ParamGroup, *, counted: bool) -> bool:
    """Return whether a wrapper acts at this update; `counted`: the count already includes this update."""
    if wrapper.acts_every is None:
        return True
    k: int = group[f"{wrapper.label}.{wrapper.acts_every}"]
    return bool((group[UPDATES] + (not counted)) % k == 0)


def _call(hook: Callable[[Group], None], views: list[GroupView]) -> None:
    for view in views:
        hook(view)
        view.write_back()


def record(run: Run, name: str, value: Any) -> None:
    """Let the wrappers that want it see a value that the user records."""
    adopt_groups(run)
    for placed in run.structure.on_record:
        placed.wrapper.on_record(GroupsView(Update(run), placed), name, value)


def _measure_loss(run: Run, loss: Any) -> None:
    real = isinstance(loss, int | float) or (hasattr(loss, "__float__") and not isinstance(loss, torch.Tensor))
    if real and not isinstance(loss, bool):
        loss = float(loss)
    elif not (isinstance(loss, torch.Tensor) and loss.numel() == 1 and not loss.is_complex()):
        loss = None
    if loss is not None:
        # at every update, as a loss that is recorded: a point is the mean of both kinds over the same updates
        run.metrics.record("train/loss", loss)


def _measure(update: Update, loss: Any) -> None:
    run = update.run
    _measure_loss(run, loss)
    if update.is_logged:
        for tag, group in zip(rate_tags(run.param_groups), run.param_groups, strict=True):
            if group.get("lr") is not None:
                run.metrics.measure(tag, group["lr"])
        if run.has_schedules:
            for tag, value in points_of(run.scheduled, run.param_groups, group_names(run.param_groups)).items():
                run.metrics.measure(tag, value)


def rate_tags(groups: list[ParamGroup]) -> list[str]:
    """Return the tag of every group's learning rate, in the groups' order."""
    return [f"train/learning_rate/{name}" if name else "train/learning_rate" for name in group_names(groups)]


def group_names(groups: list[ParamGroup]) -> list[str]:
    """Return what tags call the groups: nothing if there is one; groups of one name get their positions."""
    if len(groups) == 1:
        return [""]
    names = [str(group.get("name", position)) for position, group in enumerate(groups)]
    named = [name if names.count(name) == 1 else f"{name} {position}" for position, name in enumerate(names)]
    # "group": the rate of a group called "decay" must not read as a decay of the rate
    return [f"group {name}" for name in named]
