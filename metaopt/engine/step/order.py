"""The order of one update: evaluate, change gradients, step the base, let wrappers act; count, skip or abandon it."""

from typing import Any

from metaopt.engine import averages
from metaopt.engine.param_state import first_update, placeholders
from metaopt.engine.run.entries import AVERAGE_SHOWN, TEMPLATE, UPDATES
from metaopt.engine.run.groups import adopt_groups
from metaopt.engine.run.run import Run
from metaopt.engine.step.base_step import step_bases, turn_off_kernel_for_gradients, turn_off_unfit_kernels
from metaopt.engine.step.capture import refuse_capture
from metaopt.engine.step.evaluation import Evaluation
from metaopt.engine.step.hooks import act_behind, call, call_on_gradients, due_groups, observe, observe_loss
from metaopt.engine.step.points import measure, measure_loss
from metaopt.engine.structure import PlacedWrapper
from metaopt.engine.update.update import Update
from metaopt.engine.views.cutting import views_of
from metaopt.engine.views.groups_view import GroupsView
from metaopt.errors import StepError
from metaopt.wrapper import Closure


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

    Returns None after a template step: a client such as a distributed checkpoint steps with rates and gradients of 0
    to see the keys of the state, gets placeholders, and no update is made. A feature that is not in use costs the test
    of one flag, so that a stack without wrappers is as fast as its base.
    """
    run.skipped = None
    structure = run.structure
    adopt_groups(run)
    if run.accelerators != ():
        refuse_capture(run)
    first = run.base.param_groups[0]
    if first[AVERAGE_SHOWN]:
        averages.before_step(run)
    if not run.base.state and closure is None and placeholders.is_template_step(run):
        placeholders.add_placeholders(run)
        return None
    took_weights = run.exchange is not None and run.exchange.join()
    if run.left_out is not None:
        run.left_out = run.left_out.check(run.param_groups)
    if run.has_schedules:
        for scheduled, group in zip(run.scheduled, run.base.param_groups, strict=True):
            scheduled.check_group(group)
    update = Update(run, is_logged=run.metrics.wanted(first[UPDATES] + 1))
    update.step_weight, run.step_weight = run.step_weight, 1.0
    evaluation = Evaluation(update, closure)
    try:
        if took_weights and closure is None:
            return _skip(update, evaluation, "took the weights of the other replicas")
        if closure is not None or ((structure.needs_closure or structure.around) and not run.flushing):
            _evaluate(update, evaluation, closure)
        if run.second_clip is not None:
            run.second_clip = run.second_clip.check(run.base.param_groups)
        if not any(update.params_and_grads(group)[0] for group in run.base.param_groups) and not run.flushing:
            return _skip(update, evaluation, "no gradients")
        if structure.keeps_early_state:
            first_update.add_early_state(update)
        first_update.collect_pending_state(update)
        if structure.on_gradients or structure.gradient_observers or update.is_logged:
            call_on_gradients(update)
            if update.skip_reason is not None:
                update.remove_temporaries()
                return _skip(update, evaluation, update.skip_reason)
            if update.with_replaced_grads:  # some had no gradient before
                first_update.collect_pending_state(update)
        _prepare_base(update)
    except BaseException:
        abandon(update)
        raise
    return evaluation


def _evaluate(update: Update, evaluation: Evaluation, closure: Closure | None) -> None:
    """Evaluate the loss, by the wrappers that own the evaluation, and let the parts that only look evaluate it too."""
    evaluation.evaluate(lambda wrapper, inner: wrapper.around(inner, GroupsView(update, PlacedWrapper(wrapper, None))))
    if closure is not None and update.run.structure.loss_observers:
        observe_loss(update, evaluation.call_closure)


def _skip(update: Update, evaluation: Evaluation, reason: str) -> Evaluation:
    """End a step that makes no update: no count, schedule or average advances; other replicas are not kept waiting."""
    run = update.run
    run.skipped = reason
    if run.exchange is not None:
        run.exchange.act_in_skipped_step(update)
    if update.accumulates:
        measure_loss(run, evaluation.loss)
        run.metrics.gather_step()
    else:
        run.metrics.drop_update(gathered=bool(update.with_replaced_grads))
    evaluation.update = None
    return evaluation


def abandon(update: Update) -> None:
    """Leave an update that failed: counters and entries that were set aside return, nothing measured here counts.

    What a hook has changed in place stays. So does what a base has done, also if it is one of several and its step was
    put off.
    """
    update.make_postponed()
    for group, key, before in reversed(update.counters_before):
        group[key] = before
    update.run.metrics.drop_update()
    first_update.restore_wrapper_state(update)
    update.run.invalidate()
    update.remove_temporaries()
    update.free_memory()


def _prepare_base(update: Update) -> None:
    run, structure = update.run, update.run.structure
    if run.base.param_groups[0][TEMPLATE]:
        placeholders.remove_placeholders(run, keep_early=True)
    if update.pending_state or run.incomplete is None:
        turn_off_unfit_kernels(run)
        # a wrapper may have taken gradients away since
        update.pending_state = {p: values for p, values in update.pending_state.items() if p.grad is not None}
        first_update.set_wrapper_state_aside(update)
    for placed in structure.before_update:
        for group in due_groups(update, placed, counted=False):
            call(placed.wrapper.before_update, views_of(update, group, placed.wrapper, update.params_of(group)))
    if structure.needs_weights_before or structure.has_leading_on_update:
        # a base may take gradients away inside its step: which parameters it updates is known only now
        update.params_by_group = {id(group): update.params_of(group) for group in run.param_groups}
        for group in run.param_groups:
            if structure.chain_of(group).needs_weights_before:
                update.change.keep(update.params_of(group))
    if structure.observers and update.is_logged:
        for group in run.param_groups:
            update.change.keep_for_observers(update.params_of(group))
    for chain in list(update.pending_scale):
        turn_off_kernel_for_gradients(update, chain)
        update.fold_scale(chain)


def finish(update: Update, loss: Any) -> None:
    """Do all that comes after the base's step."""
    run = update.run
    try:
        _act_behind_base(update, loss)
        updates = run.updates
        run.metrics.end_update(updates)
        if updates > run.last_update:  # last: where warnings are errors, the update is complete all the same
            run.warn_of_end(updates)
    except BaseException:
        update.free_memory()
        raise


def _act_behind_base(update: Update, loss: Any) -> None:
    """Count the update, let wrappers act on the weights, and write the scheduled values for the next one."""
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
            if run.accelerators is None:
                run.accelerators = run.find_accelerators()
            run.watch_16_bits()
        run.state_size = len(run.base.state)
        if run.exchange is not None:
            run.exchange.count_call()
        for placed in run.structure.acts_behind:
            act_behind(update, placed)
        update.make_postponed()
        if run.still_watch is not None:
            run.still_watch = run.still_watch.check(run.base.state, run.updates)
        if run.structure.observers:
            observe(update)
        measure(update, loss)
    except BaseException:
        run.metrics.drop_update(gathered=True)
        update.make_postponed()
        raise
    finally:
        update.remove_temporaries()
        if run.has_schedules:
            run.write_schedules()


def record(run: Run, name: str, value: Any) -> None:
    """Let the wrappers that want it see a value that the user records."""
    adopt_groups(run)
    for placed in run.structure.on_record:
        placed.wrapper.on_record(GroupsView(Update(run), placed), name, value)
