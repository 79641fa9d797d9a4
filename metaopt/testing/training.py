"""Checks of single steps: what moves, what stays, what is fed."""

import copy
from typing import Any

import torch

from metaopt.stack import Stack
from metaopt.testing.comparing import first_difference, same
from metaopt.testing.feeding import MIDDLE, STEPS, Halves, make_batch, own_random_numbers
from metaopt.testing.outcome import REPEATS, RESUMES, CheckFailed, NotApplicable, check, failing
from metaopt.testing.subject import StackSubject, refused, weights


@check("optimizer", "wrapper")
def changes_parameters(subject: StackSubject) -> None:
    """A few steps change every parameter, and leave all of them finite."""
    run = subject.run
    for position, (before, after) in enumerate(zip(run.weights[0], run.weights[-1], strict=True)):
        if not bool(after.isfinite().all()):
            raise CheckFailed(
                f"{subject}: parameter {position} is not finite after {STEPS} steps on a harmless problem",
                "A run that begins so has failed already",
                "Look for a division by a sum of squares that is 0 at first, or a default rate that is far too large",
            )
        if same(before, after):
            raise CheckFailed(
                f"{subject}: {STEPS} steps left parameter {position} of shape {tuple(after.shape)} as it was",
                "An optimizer that does not move trains nothing",
                "Update every parameter that has a gradient; where the defaults need longer, give a "
                "metaopt.Example(spec=...) that acts sooner",
            )


@check("optimizer", "wrapper")
def keeps_parameters_in_place(subject: StackSubject) -> None:
    """Parameters stay the same objects, with the same storage and dtype."""
    model, opt = subject.pair()
    before = [(p, p.data_ptr(), p.dtype) for p in model.parameters()]
    subject.train(model, opt, 0, STEPS)
    held = {id(p) for group in opt.param_groups for p in group["params"]}
    for position, (p, place, dtype) in enumerate(before):
        if id(p) not in held or p.data_ptr() != place or p.dtype != dtype or p.grad_fn is not None:
            raise CheckFailed(
                f"{subject} replaced the memory of parameter {position}",
                "Sharding, compiled graphs and tied weights hold on to the old memory and would no longer be updated",
                "Update in place (p.add_(...), torch._foreach_*_(...)), never p.data = ..., and under torch.no_grad()",
            )


@check("optimizer", "wrapper")
def works_without_some_gradients(subject: StackSubject) -> None:
    """A parameter without a gradient is left alone, and one whose gradient comes late is updated then."""
    model, opt = subject.pair()
    before = weights(model.right)
    for number in range(4):
        subject.step(model, opt, number, halves=(0,))
    if not same(before, weights(model.right)):
        raise CheckFailed(
            f"{subject} changed a parameter that never had a gradient",
            "Frozen layers and unused experts must stay as they are",
            "Skip every parameter whose grad is None",
        )
    held = [p for p in model.right.parameters() if opt.state.get(p)]
    if held:
        raise CheckFailed(
            f"{subject} made state for a parameter that never had a gradient: {sorted(map(str, opt.state[held[0]]))}",
            "State is made at a parameter's first update, so that it starts where training starts",
            "Skip every parameter whose grad is None before you touch its state",
        )
    with failing(
        "when gradients come to some parameters after four steps without",
        "Layers are unfrozen and experts are chosen late",
        "Make a parameter's state at its own first update, and find it by the parameter, never by a place in a list",
    ):
        subject.train(model, opt, 4, STEPS)
    with failing(
        "when some parameters have no gradient after six steps",
        "An expert that was chosen may not be chosen again",
        "Skip every parameter whose grad is None, whatever its state; keep no list of those of the step before",
    ):
        subject.step(model, opt, STEPS, halves=(0,))
    if same(before, weights(model.right)):
        raise CheckFailed(
            f"{subject} never updated a parameter whose gradient came after the first step",
            "Layers are unfrozen and experts are chosen late",
            "Make a parameter's state at its own first update, not all of them at step 1",
        )


@check("wrapper", presumes=(REPEATS,))
def leaves_frozen_parameters_alone(subject: StackSubject) -> None:
    """A parameter that is frozen in the middle of a run stays exactly where it is, and trains on when unfrozen."""
    model, opt = subject.pair()
    subject.train(model, opt, 0, MIDDLE)
    model.right.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    frozen = weights(model.right)
    for number in range(MIDDLE, MIDDLE + STEPS):
        subject.step(model, opt, number, halves=(0,))
        if not same(frozen, weights(model.right)):
            raise CheckFailed(
                f"{subject} moved a frozen parameter",
                "Who freezes a layer in the middle of a run wants it to stay exactly as it is",
                "Leave acts_on_frozen = False if the wrapper moves weights: after_update then gets no frozen parameter",
            )
    model.right.requires_grad_(True)
    with failing(
        "when a parameter is unfrozen again",
        "Layers are frozen for a while",
        "Find the state of a parameter by the parameter, never by a place in a list of the update before",
    ):
        subject.train(model, opt, MIDDLE + STEPS, MIDDLE + 2 * STEPS)
    if same(frozen, weights(model.right)):
        raise CheckFailed(
            f"{subject} does not update a parameter that is unfrozen again",
            "Layers are frozen for a while",
            "Act on group.params at every update, and remember no parameters between updates",
        )


@check("optimizer", "wrapper", presumes=(REPEATS,))
def evaluates_a_closure(subject: StackSubject) -> None:
    """`step(closure)` returns the closure's loss and trains like `step()` after `backward()`."""
    model, opt = subject.pair()
    calls: list[bool] = []
    found = []
    for number in range(STEPS):
        returned, first = _closure_step(subject, model, opt, number, calls)
        found.append(weights(model))
        if not isinstance(returned, torch.Tensor | float) or first is None or not same(returned, first):
            raise CheckFailed(
                f"{subject}: step(closure) returned {returned!r:.60}, not the loss of its first evaluation {first!r}",
                "Lightning and torch's own L-BFGS loops read the loss from there",
                "Return what the closure returned (a wrapper: from `around`)",
            )
    if not all(calls):
        raise CheckFailed(
            f"{subject} evaluated the closure with gradients switched off",
            "The closure calls backward()",
            "Call the closure under torch.enable_grad()",
        )
    if not subject.calls_closure and len(calls) != STEPS:
        raise CheckFailed(
            f"{subject} evaluated the closure {len(calls)} times in {STEPS} steps",
            "An evaluation is the expensive part of a step",
            "Evaluate the closure once, or do so in `around`, which says that more are needed",
        )
    difference = subject.parting(subject.run.weights[1:], found, 1)
    if difference:
        raise CheckFailed(
            f"{subject}: {difference} between step(closure) and backward() followed by step()",
            "Both are one update with the same gradients",
            "Do not depend on whether a closure is given",
        )


def _closure_step(
    subject: StackSubject, model: Halves, opt: Stack, number: int, calls: list[bool]
) -> tuple[Any, torch.Tensor | None]:
    batch = make_batch(model, number)
    losses = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        with torch.enable_grad():
            losses.append(subject.gradients(model, batch))
        return losses[-1]

    try:
        with own_random_numbers(number, subject.device):
            returned = opt.step(closure)
    except Exception as error:
        raise CheckFailed(
            f"{subject}: step(closure) raised {type(error).__name__}: {str(error)[:300]}",
            "Lightning always gives a closure",
            "Take `closure=None` in step(), and call it where it is given",
        ) from error
    return returned, losses[0] if losses else None


@check("optimizer", "wrapper", presumes=(REPEATS, RESUMES))
def takes_a_group_later(subject: StackSubject) -> None:
    """`add_param_group` in the middle of a run gives parameters that are updated, saved and loaded like the others."""
    model = subject.model()
    early, late = model.groups()
    opt = subject.stack([early])
    for number in range(3):
        subject.step(model, opt, number, halves=(0,))
    before = weights(model.right)
    try:
        opt.add_param_group(late)
        subject.step(model, opt, 3)
    except Exception as error:
        if _bare_refuses_groups(subject):
            raise NotApplicable(f"its base refuses it: {str(error)[:200]}") from error
        if isinstance(error, CheckFailed):
            raise
        raise CheckFailed(
            f"{subject}: add_param_group raised {type(error).__name__}: {str(error)[:200]}",
            "Layers are unfrozen in the middle of a run",
            "Let torch.optim.Optimizer.add_param_group do its work",
        ) from error
    for number in range(4, STEPS):
        subject.step(model, opt, number)
    if same(before, weights(model.right)):
        raise CheckFailed(
            f"{subject} does not update the parameters of a group that was added later",
            "Layers are unfrozen in the middle of a run",
            "Read the parameters from self.param_groups at every step, never from a list made at construction",
        )
    again = subject.model()
    twin = subject.stack(again.groups())
    again.load_state_dict(model.state_dict())
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    difference = subject.parting(
        subject.train(model, opt, STEPS, STEPS + 3), subject.train(again, twin, STEPS, STEPS + 3), 1
    )
    if difference:
        raise CheckFailed(
            f"{subject}: with a group added in mid-run, a checkpoint does not continue the run: {difference}",
            "The new group's state and counters belong to the checkpoint as much as the old ones",
            "Keep counters in the groups and tensors in the state, for every group alike",
        )


def _bare_refuses_groups(subject: StackSubject) -> bool:
    model = subject.model()
    early, late = model.groups()
    bare = subject.stack([early], subject.base_alone).base
    try:
        bare.add_param_group(late)
        subject.step(model, bare, 0)
    except Exception:
        return True
    return False


@check("optimizer", "wrapper", presumes=(REPEATS,))
def skipped_update_advances_nothing(subject: StackSubject) -> None:
    """A step without gradients, and one that GradScaler skips, change no weight, no counter and no average."""
    model, opt = subject.pair()
    subject.train(model, opt, 0, 3)
    before = weights(model), copy.deepcopy(opt.state_dict())
    model.zero_grad(set_to_none=True)
    opt.step((lambda: torch.zeros(())) if subject.calls_closure else None)
    _unchanged(subject, before, model, opt, "a step without any gradient")
    if not opt.skipped:
        raise CheckFailed(f"{subject} does not say that a step was skipped", "Training loops ask", "See opt.skipped")
    if not subject.calls_closure:
        _scaler_skip(subject, model, opt, before)
    difference = subject.parting(subject.run.weights[4:], subject.train(model, opt, 3, STEPS), 4)
    if difference:
        raise CheckFailed(
            f"{subject}: {difference} when a step was skipped in between",
            "A skipped update is not an update",
            "Count updates in `group.updates` alone",
        )


def _scaler_skip(subject: StackSubject, model: Halves, opt: Stack, before: Any) -> None:
    scaler = torch.amp.GradScaler(subject.device.type, init_scale=2.0)
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.inf)
        if subject.example.gradients == "sparse":
            p.grad = p.grad.to_sparse(1)
    scaler.scale(torch.ones((), device=subject.device))
    try:
        scaler.step(opt)
    except Exception as error:
        if refused(error):
            return
        raise
    scaler.update()
    _unchanged(subject, before, model, opt, "infinite gradients under GradScaler")
    model.zero_grad(set_to_none=True)


def _unchanged(subject: StackSubject, before: Any, model: Halves, opt: Stack, what: str) -> None:
    difference = first_difference((before[0], before[1]), (weights(model), opt.state_dict()))
    if difference:
        raise CheckFailed(
            f"{subject}: {what} changed {difference}",
            "A skipped update advances nothing: no counter, no schedule, no average",
            "Act only in the hooks, and take the count from `group.updates`",
        )


@check("optimizer", "wrapper")
def stacks_do_not_disturb_each_other(subject: StackSubject) -> None:
    """Two stacks of the same part, trained in turns in one process, both run as if they were alone."""
    pairs = [subject.pair(), subject.pair()]
    runs: list[list[list[torch.Tensor]]] = [[], []]
    for number in range(STEPS):
        for run, (model, opt) in zip(runs, pairs, strict=True):
            run += subject.train(model, opt, number, number + 1)
    for run in runs:
        difference = subject.parting(subject.run.weights[1:], run, 1)
        if difference:
            raise CheckFailed(
                f"{subject}: {difference} when two stacks train in turns in one process",
                "What one stack leaves in a class attribute, a module or a generator of its own reaches the other",
                "Keep what changes in the groups and the state; draw random numbers from torch's generator",
            )
