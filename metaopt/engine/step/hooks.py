"""When a wrapper's hook is called, and with which parameters; what it changed goes into gradients and weights."""

from collections.abc import Callable
from operator import attrgetter

from metaopt.engine.chain import Chain, ParamGroup
from metaopt.engine.run.entries import UPDATES
from metaopt.engine.structure import PlacedWrapper
from metaopt.engine.update.change import Params
from metaopt.engine.update.update import Update
from metaopt.engine.views.cutting import block_views_of, views_of
from metaopt.engine.views.group_view import GroupView
from metaopt.engine.views.groups_view import GroupsView, gradient_norm
from metaopt.engine.views.params import trained_params
from metaopt.group import Group
from metaopt.multi_tensor import on_accelerator
from metaopt.wrapper import Closure, Wrapper


def call_on_gradients(update: Update) -> None:
    """Let the wrappers on gradients act until one skips the update: before the base, and when it evaluates again."""
    run = update.run
    update.skip_reason = None
    update.pending_scale.clear()
    _coalesce(update)
    if update.is_logged and not run.has_zero_shard:
        run.metrics.measure("train/grad_norm", gradient_norm(update, run.structure.chains, run.param_groups))
    if run.structure.gradient_observers:
        observe_gradients(update, gathered=False)
    for placed in run.structure.on_gradients:
        groups = run.groups_of(placed)
        if placed.chain is not None and not any(update.params_and_grads(group)[0] for group in groups):
            continue
        if run.flushing and not placed.wrapper.spans_steps and not any(map(update.params_of, groups)):
            continue
        view = GroupsView(update, placed, groups)
        placed.wrapper.on_gradients(view)
        view.write_back()
        if update.skip_reason is not None:
            update.accumulates = placed.wrapper.spans_steps is not None
            return
        if placed.wrapper.spans_steps and run.structure.gradient_observers:
            observe_gradients(update, gathered=True)


def _coalesce(update: Update) -> None:
    """Add up the rows that a sparse gradient holds twice: an embedding leaves a row that it looked up twice as two."""
    for group in update.run.base.param_groups:
        params, gradients = update.params_and_grads(group)
        if update.uniform_dtype(group) is None and any(map(attrgetter("is_sparse"), gradients)):
            for p, gradient in zip(params, gradients, strict=True):
                if gradient.is_sparse and not gradient.is_coalesced():
                    p.grad = gradient.coalesce()
            update.gradients_changed()


def keep_weights_for_on_update(update: Update, chain: Chain) -> None:
    """Copy the weights of a base that is stepped as a whole, where a wrapper on the update is due."""
    for group in chain.groups_in(update.run.param_groups):
        if any(is_due(wrapper, group, counted=False) for wrapper in chain.leading_on_update):
            update.change.keep(update.params_of(group))


def call_on_update_of_chain(update: Update, chain: Chain) -> None:
    """Let the wrappers act on the update of a base that was stepped as a whole."""
    for group in chain.groups_in(update.run.param_groups) if chain.leading_on_update else ():
        wrappers = [w for w in chain.leading_on_update if is_due(w, group, counted=False)]
        if wrappers:
            call_on_update(update, group, wrappers, update.params_of(group))
            if not chain.needs_weights_before:
                update.change.forget(update.params_of(group))


def call_on_update(update: Update, group: ParamGroup, wrappers: list[Wrapper], params: Params) -> None:
    """Let wrappers change what is added to some parameters, in written order, and add it.

    If one raises, the parameters hold the weights from before: nothing of their change is added.
    """
    update.change.return_to_weights_before(params)
    for wrapper in wrappers:
        # rules are few launches there; by hand, a processor touches less memory
        by_rules = wrapper.has_rules and on_accelerator(params)
        hook = wrapper.update_rules if by_rules else wrapper.on_update
        call(hook, block_views_of(update, group, wrapper, params, updates=update.updates_before))
    update.change.apply(params)


def act_behind(update: Update, placed: PlacedWrapper) -> None:
    """Call what a wrapper does behind the base: a later `on_update`, `after_updates`, `after_update`."""
    wrapper = placed.wrapper
    if update.run.exchange is not None and wrapper.takes_means:
        update.run.exchange.act(update, placed)
        return
    due = due_groups(update, placed, counted=True)
    if not due:
        return
    hooks = wrapper.implemented_hooks()
    if "after_updates" in hooks or not wrapper.has_rules:
        update.make_postponed()
    if "on_update" in hooks:
        for group in due:
            if wrapper not in update.run.structure.chain_of(group).leading_on_update:
                call_late_on_update(update, group, wrapper)
    # a base of a partition may have had no gradient
    if "after_updates" in hooks and any(update.params_of(group) for group in due):
        view = GroupsView(update, placed, due)
        wrapper.after_updates(view)
        view.write_back()
        for group in due:
            _follow(update, group, wrapper, update.change.apply_written(update.params_of(group)))
    if "after_update" in hooks:
        for group in due:
            params = trained_params(update, group, wrapper)
            cut = views_of if id(group) in update.postponed else block_views_of
            call(wrapper.after_update, cut(update, group, wrapper, params))


def call_late_on_update(update: Update, group: ParamGroup, wrapper: Wrapper) -> None:
    """Let a wrapper change the update after others have moved the weights: their moves are part of it."""
    params = update.params_of(group)
    try:
        call_on_update(update, group, [wrapper], params)
    except BaseException:
        # the update counts already: it must not be taken back from the weights
        update.change.apply([p for p in params if p in update.change.unapplied])
        raise
    _follow(update, group, wrapper, params)


def _follow(update: Update, group: ParamGroup, wrapper: Wrapper, params: Params) -> None:
    """Let anchors nearer the base follow the weights that a wrapper has moved."""
    for view in views_of(update, group, wrapper, params):
        view.move_inner_anchors()


def observe(update: Update) -> None:
    """Let the parts that only look see a logged update, and those that look ahead the one before it."""
    run = update.run
    if update.is_logged:
        update.change.begin_observing()
    for placed in run.structure.observers:
        ahead = placed.wrapper.looks_ahead() and run.metrics.wanted(run.updates + 1)
        groups = run.groups_of(placed)
        if (update.is_logged or ahead) and any(map(update.params_of, groups)):
            view = GroupsView(update, placed, groups)
            placed.wrapper.observe(view)
            view.write_back()
    update.change.whole = None


def observe_gradients(update: Update, *, gathered: bool) -> None:
    """Let the parts that only look see the gradients; `gathered`: those of all steps of the update."""
    for placed in update.run.structure.gradient_observers:
        groups = update.run.groups_of(placed)
        if any(update.params_and_grads(group)[0] for group in groups):
            placed.wrapper.observe_gradients(GroupsView(update, placed, groups), gathered=gathered)


def observe_loss(update: Update, closure: Closure) -> None:
    """Let the parts that only look evaluate the loss."""
    for placed in update.run.structure.loss_observers:
        placed.wrapper.observe_loss(closure, GroupsView(update, placed))


def due_groups(update: Update, placed: PlacedWrapper, *, counted: bool) -> list[ParamGroup]:
    """Return the groups on which a wrapper acts at this update; see `is_due`."""
    return [group for group in update.run.groups_of(placed) if is_due(placed.wrapper, group, counted=counted)]


def is_due(wrapper: Wrapper, group: ParamGroup, *, counted: bool) -> bool:
    """Return whether a wrapper acts at this update; `counted`: the count already includes this update."""
    if wrapper.acts_every is None:
        return True
    k: int = group[f"{wrapper.label}.{wrapper.acts_every}"]
    return bool((group[UPDATES] + (not counted)) % k == 0)


def call(hook: Callable[[Group], None], views: list[GroupView]) -> None:
    """Call a hook with each view, and send back what it changed of copies from another device."""
    for view in views:
        hook(view)
        view.write_back()
