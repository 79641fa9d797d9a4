"""Checks of averages: shown on request, and undone exactly."""

from metaopt.testing.comparing import first_difference
from metaopt.testing.feeding import MIDDLE, STEPS
from metaopt.testing.outcome import REPEATS, RESUMES, CheckFailed, NotApplicable, check
from metaopt.testing.subject import StackSubject, checkpoint, weights


@check("wrapper", presumes=(REPEATS, RESUMES))
def averages_swap_in_and_out(subject: StackSubject) -> None:
    """`opt.averaged()` shows the average and gives the weights back exactly, in a loaded checkpoint too."""
    model, opt = subject.pair()
    if "averaged" not in subject.wrapper_of(opt).implemented_hooks():
        raise NotApplicable("it keeps no average")
    with opt.averaged(subject.label):
        if subject.parting([weights(model)], subject.run.weights[:1], 0):
            raise _swap_failed(subject, "before the first update averaged() does not show the current weights")
    subject.train(model, opt, 0, MIDDLE)
    before = checkpoint(model, opt)
    with opt.averaged(subject.label):
        shown, inside = weights(model), checkpoint(model, opt)
    after = checkpoint(model, opt)
    difference = first_difference(before, after)
    if difference:
        raise _swap_failed(subject, f"entering and leaving averaged() changed {difference}")
    if not subject.parting([shown], [list(before["model"].values())], 0):
        raise _swap_failed(subject, "averaged() shows the plain weights in the middle of a run")
    model, opt = subject.resumed(inside)
    opt.zero_grad()  # the weights of a checkpoint taken inside are swapped back before gradients are computed
    difference = subject.parting(
        subject.run.weights[MIDDLE + 1 :], subject.train(model, opt, MIDDLE, STEPS), MIDDLE + 1
    )
    if difference:
        raise _swap_failed(subject, f"a checkpoint taken inside averaged() does not continue the run: {difference}")


def _swap_failed(subject: StackSubject, what: str) -> CheckFailed:
    return CheckFailed(
        f"{subject}: {what}",
        "Users evaluate inside averaged() and train on after it",
        "Return from `averaged` the state's own tensors, one for each of group.params; the engine swaps them",
    )
