"""Checks with torch.distributed.checkpoint: its template step counts for nothing, and what it saves it can load."""

from typing import Any

from metaopt.testing.feeding import MIDDLE, STEPS
from metaopt.testing.outcome import REPEATS, RESUMES, CheckFailed, check
from metaopt.testing.subject import StackSubject, weights


@check("optimizer", "wrapper", presumes=(REPEATS, RESUMES))
def template_step_leaves_the_run_alone(subject: StackSubject) -> None:
    """Taking a distributed checkpoint's state dict before the first update changes nothing, and loading one works."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, opt = subject.pair()
    try:
        get_optimizer_state_dict(model, opt)
    except Exception as error:
        raise CheckFailed(
            f"{subject}: get_optimizer_state_dict on a fresh stack raised {type(error).__name__}: {str(error)[:200]}",
            "Distributed checkpoint makes state appear by one step with zero gradients and lr=0",
            "Let a step with zero gradients pass, and guard divisions by norms",
        ) from error
    difference = subject.parting(subject.run.weights[:1], [weights(model)], 0)
    difference = difference or subject.parting(subject.run.weights[1:], subject.train(model, opt, 0, STEPS), 1)
    if difference:
        raise CheckFailed(
            f"{subject}: {difference} because a state dict was taken before the first update",
            "Saving must not change the run: the template step of distributed checkpoint is not an update",
            "Start everything in the group and the state at a parameter's first update, and count nowhere else",
        )
    _loads_distributed(subject, get_optimizer_state_dict, set_optimizer_state_dict)


def _loads_distributed(subject: StackSubject, get: Any, put: Any) -> None:
    model, opt = subject.pair()
    subject.train(model, opt, 0, MIDDLE)
    twin, other = subject.pair()
    twin.load_state_dict(model.state_dict())
    try:
        put(twin, other, optim_state_dict=get(model, opt))
    except Exception as error:
        raise CheckFailed(
            f"{subject}: set_optimizer_state_dict raised {type(error).__name__}: {str(error)[:200]}",
            "Sharded training loads its checkpoints so",
            "Keep only tensors and numbers in the state, the same entries for every parameter from its first update on",
        ) from error
    difference = subject.parting(
        subject.run.weights[MIDDLE + 1 :], subject.train(twin, other, MIDDLE, STEPS), MIDDLE + 1
    )
    if difference:
        raise CheckFailed(
            f"{subject}, saved and loaded as a distributed checkpoint after step {MIDDLE}: {difference}",
            "Sharded training loads its checkpoints so",
            "Keep all that matters to the next update in the groups and the state",
        )
