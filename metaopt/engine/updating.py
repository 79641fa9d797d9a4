"""One update: gradients are filtered, the bases step, the wrappers behind them act."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from metaopt.engine import averaging, first_update, template
from metaopt.engine.evaluation import Evaluation
from metaopt.engine.gradients import filter_gradients
from metaopt.engine.lanes import Entry, Lane
from metaopt.engine.members import Members, updated, with_gradient
from metaopt.engine.recording import rate_tags
from metaopt.engine.scaling import fold_scale
from metaopt.engine.views import pieces, small_pieces
from metaopt.wrapper import Closure, Group, Wrapper

if TYPE_CHECKING:
    from metaopt.stack import Stack

# a wrapper and the lane that it belongs to; None: it stands around all lanes
Placed = tuple[Wrapper, Lane | None]


class Phases:
    """Which wrappers act in which phase of an update, in order: found once, when a stack is made."""

    def __init__(self, wrappers: Sequence[Wrapper], lanes: Sequence[Lane]) -> None:
        own: list[Placed] = [(wrapper, None) for wrapper in wrappers]
        inner: list[Placed] = [(wrapper, lane) for lane in lanes for wrapper in lane.wrappers]
        self.around = [wrapper for wrapper, _ in own if "around" in wrapper.implemented_hooks()]
        self.on_gradients = [placed for placed in (*own, *inner) if "on_gradients" in placed[0].implemented_hooks()]
        self.before_update = [placed for placed in (*own, *inner) if "before_update" in placed[0].implemented_hooks()]
        self.after_update = [placed for placed in (*inner, *own) if "after_update" in placed[0].implemented_hooks()]
        self.stateful = any(lane.slots for lane in lanes)
        self.take_previous = any(lane.previous_slots for lane in lanes)
        self.gather_early = any(lane.early_keys for lane in lanes)


def begin(stack: "Stack", closure: Closure | None) -> tuple[Any, Evaluation | None, bool]:
    """Do all that comes before the base's step; return the loss, its evaluation, and whether an update is due.

    What is not asked for costs one look at a flag: a stack of a base alone is to cost what the base costs.
    """
    stack.skipped = None
    groups, phases = stack.base.param_groups, stack.phases
    stack.settle_groups()
    first = groups[0]
    if first["metaopt.swapped"]:
        averaging.before_step(stack)
    if not stack.base.state and closure is None and template.is_template_step(stack):
        template.make_state(stack, "asked")
        return None, None, False
    if stack.scheduled:
        for timetable, entry in zip(stack.timetables, groups, strict=True):
            timetable.check(entry)
    stack.measuring = stack.metrics_of_run.wanted(first["metaopt.updates"] + 1)
    run, loss = None, None
    if closure is not None or stack.needs_closure or phases.around:
        run = Evaluation(stack, closure)
        loss = run.first()
    if not any(p.grad is not None for entry in groups for p in entry["params"]):
        return skip(stack, "no gradients", loss)
    try:
        if phases.gather_early:
            template.make_early_state(stack)
        if phases.stateful or stack.set_aside or stack.awaits_latecomers or not stack.base.state:
            stack.copies = _copies_before_update(stack)
        if phases.on_gradients or stack.measuring:
            filter_gradients(stack)
            if stack.held_back is not None:
                _end(stack)
                return skip(stack, stack.held_back, loss)
            if stack.borrowers:  # some had no gradient before
                stack.copies = {**_copies_before_update(stack), **stack.copies}
        _make_ready(stack)
    except BaseException:
        abandon(stack)
        raise
    return loss, run, True


def _copies_before_update(stack: "Stack") -> first_update.Copies:
    """Return what wrappers must keep of parameters at their first update; looks at none where all are known whole."""
    state = stack.base.state
    if stack.found_whole == len(state) == sum(len(entry["params"]) for entry in stack.base.param_groups):
        return {}
    return first_update.take_copies(stack)


def _make_ready(stack: "Stack") -> None:
    phases = stack.phases
    if stack.base.param_groups[0]["metaopt.template"]:
        template.leave(stack)
    if stack.copies or not stack.kernels_settled:
        first_update.leave_refused_kernels(stack, stack.copies)
        stack.lifted = first_update.make_way(stack, stack.copies)
    for wrapper, lane in phases.before_update:
        for entry in _due(stack, wrapper, lane, update_in_progress=True):
            _call(wrapper.before_update, stack, entry, wrapper, with_gradient(entry))
    if phases.take_previous:
        # a base may take gradients away inside its step: which parameters it updates is known now alone
        stack.moved = _take_previous(stack)
    for lane in stack.lanes:
        if lane.pending_scale is not None:
            fold_scale(stack, lane)


def finish(stack: "Stack", loss: Any) -> None:
    """Do all that comes after the base's step."""
    base, groups = stack.base, stack.base.param_groups
    # a torch scheduler bound to the base before it was wrapped looks here
    base._opt_called = True  # type: ignore[attr-defined]
    try:
        if stack.copies:
            copies, stack.copies = stack.copies, {}
            first_update.store_copies(stack, copies)
        if stack.found_whole != len(base.state):
            stack.found_whole = len(base.state) if first_update.all_whole(stack) else -1
        for entry in groups:
            entry["metaopt.updates"] += 1
        for wrapper, lane in stack.phases.after_update:
            for entry in _due(stack, wrapper, lane):
                _call(wrapper.after_update, stack, entry, wrapper, updated(stack, entry, wrapper))
        if loss is not None or stack.measuring:
            _measure(stack, loss)
    finally:
        _end(stack)
        # the update was made, also where a wrapper behind it raised
        if stack.scheduled:
            for timetable, entry in zip(stack.timetables, groups, strict=True):
                timetable.write(entry)
    stack.metrics_of_run.end_update(groups[0]["metaopt.updates"])


def skip(stack: "Stack", reason: str, loss: Any) -> tuple[Any, None, bool]:
    """Leave a step that makes no update: nothing advances."""
    stack.skipped = reason
    stack.metrics_of_run.drop_update()
    return loss, None, False


def abandon(stack: "Stack") -> None:
    """Leave an update that failed: nothing of the wrappers' state is lost, nothing that it measured counts."""
    stack.metrics_of_run.drop_update()
    first_update.put_back(stack, stack.copies, stack.lifted)
    stack.look_again()
    _end(stack)


def _end(stack: "Stack") -> None:
    """Take back what was lent for one update, whether or not it was made."""
    if stack.copies or stack.lifted or stack.moved:
        stack.copies, stack.lifted, stack.moved = {}, {}, {}
    for lane in stack.lanes:
        lane.base.__dict__.pop("grad_scale", None)
        # a factor that a skipped update never used must not meet the gradients of the next evaluation
        lane.pending_scale = None
    for entry in stack.unfused:
        entry["fused"] = True
    stack.unfused.clear()
    if stack.borrowers:
        for p in stack.borrowers:
            p.grad = None
        stack.borrowers.clear()


def _measure(stack: "Stack", loss: Any) -> None:
    if isinstance(loss, float) or (isinstance(loss, torch.Tensor) and loss.numel() == 1 and not loss.is_complex()):
        # at every update, as a loss that is recorded: a point is the mean of both kinds over the same updates
        stack.measure("train/loss", loss)
    if not stack.measuring:
        return
    for tag, entry in zip(rate_tags(stack), stack.param_groups, strict=True):
        if "lr" in entry:
            stack.measure(tag, entry["lr"])


def _take_previous(stack: "Stack") -> dict[int, Members]:
    """Copy the parameters that have gradients for the wrappers that ask for it; return them, by group."""
    moved = {id(entry): with_gradient(entry) for entry in stack.param_groups}
    for entry in stack.param_groups:
        for key in stack.lane_of(entry).previous_slots:
            for p in moved[id(entry)]:
                stack.held(p)[key].copy_(p)
    return moved


def _due(stack: "Stack", wrapper: Wrapper, lane: Lane | None, *, update_in_progress: bool = False) -> list[Entry]:
    """Return the groups for which a wrapper acts at this update, which counts already once it was made."""
    entries = stack.param_groups if lane is None else lane.entries(stack.param_groups)
    if wrapper.every is None:
        return entries
    key = f"{wrapper.label}.{wrapper.every}"
    return [entry for entry in entries if (entry["metaopt.updates"] + update_in_progress) % entry[key] == 0]


def _call(method: Callable[[Group], None], stack: "Stack", entry: Entry, wrapper: Wrapper, members: Members) -> None:
    for piece in (small_pieces if wrapper.elementwise else pieces)(stack, entry, wrapper, members):
        method(piece)
