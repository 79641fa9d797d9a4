"""Checks of runs that go on elsewhere: from a checkpoint, in place, as a copy; each is the uninterrupted run."""

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import torch

from metaopt.engine.chain import RUN_FLAGS
from metaopt.stack import Stack
from metaopt.testing.comparing import attributes, changed_attributes, first_difference
from metaopt.testing.feeding import MIDDLE, STEPS, Halves
from metaopt.testing.new_process import continue_from_every_step
from metaopt.testing.outcome import REPEATS, CheckFailed, check
from metaopt.testing.subject import StackSubject


@check("optimizer", "wrapper")
def state_dict_round_trip(subject: StackSubject) -> None:
    """A state dict can be read with weights_only=True, and a stack that loaded it gives the same one back."""
    saved = subject.run.checkpoints[MIDDLE]
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    try:
        read = torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckFailed(
            f"{subject}: its state dict cannot be read with weights_only=True: {_refused_by_torch(error)}",
            "A checkpoint that needs a class to be read can also run code",
            "Keep only tensors, numbers, text and lists, tuples and dicts of these in the state and the groups",
        ) from error
    for _, opt in (subject.resumed(read), _loaded_twice(subject, read)):
        difference = first_difference(_said(saved["opt"]), _said(opt.state_dict()))
        if difference:
            raise CheckFailed(
                f"{subject}: after load_state_dict the state dict differs at {difference}",
                "What a checkpoint loses cannot be continued",
                "Keep state in the parameter's own dtype, or restore yours in load_state_dict (a wrapper: declare a "
                "slot with dtype=); do not rename entries",
            )


def _refused_by_torch(error: pickle.UnpicklingError) -> str:
    """Return the one line of torch's message that names what it does not read."""
    found = re.search(r"WeightsUnpickler error: (.+?)(\. |\n|$)", str(error))
    return (found.group(1) if found else " ".join(str(error).split()))[:200]


def _said(state_dict: dict[str, Any]) -> dict[str, Any]:
    # looking into a defaultdict leaves an empty entry, which says nothing; how to run is the live stack's
    groups = [{k: v for k, v in group.items() if k not in RUN_FLAGS} for group in state_dict["param_groups"]]
    return {"state": {i: held for i, held in state_dict["state"].items() if held}, "param_groups": groups}


def _loaded_twice(subject: StackSubject, saved: dict[str, Any]) -> tuple[Halves, Stack]:
    model, opt = subject.resumed(saved)
    opt.load_state_dict(copy.deepcopy(saved["opt"]))
    return model, opt


@check("optimizer", "wrapper", presumes=("state_dict_round_trip", REPEATS))
def resumes_in_a_new_process(subject: StackSubject) -> None:
    """Saved at every step and loaded in a new process, the run goes on bit for bit as if never interrupted."""
    before = attributes(subject.pair()[1])
    for step, found in continue_from_every_step(subject).items():
        difference = subject.parting(subject.run.weights[step + 1 :], found, step + 1)
        if difference:
            model, opt = subject.pair()
            subject.train(model, opt, 0, STEPS)
            raise CheckFailed(
                f"{subject}, saved after step {step} and continued in a new process: {difference}"
                f"{changed_attributes(before, attributes(opt))}",
                "Something that matters to the next update is not in the state dict: every resumed run is another run",
                "Keep counters in the group (an optimizer: group['step'] or state[p]['step']; a wrapper: use "
                "group.updates), tensors in the state (a wrapper: declare anchor(), start() or zeros())",
            )


@check("optimizer", "wrapper", presumes=(REPEATS,))
def rewinds_in_place(subject: StackSubject) -> None:
    """A checkpoint loaded into the running stack takes the run back to it, exactly."""
    model, opt = subject.pair()
    subject.train(model, opt, 0, STEPS - 1)
    saved = subject.run.checkpoints[MIDDLE]
    model.load_state_dict(saved["model"])
    opt.load_state_dict(copy.deepcopy(saved["opt"]))
    difference = subject.parting(
        subject.run.weights[MIDDLE + 1 :], subject.train(model, opt, MIDDLE, STEPS), MIDDLE + 1
    )
    if difference:
        raise CheckFailed(
            f"{subject}, taken back to step {MIDDLE} by load_state_dict in the middle of a run: {difference}",
            "Loading replaces the state's tensors; whoever kept lists of the old ones goes on with those",
            "Look state up at every update (self.state[p][...], group.<slot>); keep no tensors and no counts in "
            "attributes of your own",
        )


@check("optimizer", "wrapper", presumes=(REPEATS,))
def survives_replaced_tensors(subject: StackSubject) -> None:
    """Clients may replace state tensors by equal ones at any time, as ZeRO and Lightning do."""
    model, opt = subject.pair()
    subject.train(model, opt, 0, MIDDLE)
    for held in (held for held in opt.state.values() if isinstance(held, dict)):
        for key, value in held.items():
            if isinstance(value, torch.Tensor):
                held[key] = value.clone()
    difference = subject.parting(
        subject.run.weights[MIDDLE + 1 :], subject.train(model, opt, MIDDLE, STEPS), MIDDLE + 1
    )
    if not difference and not subject.example.tolerance:
        other = first_difference(_said(subject.run.checkpoints[-1]["opt"]), _said(opt.state_dict()))
        difference = other and f"the state dict at the end differs at {other}"
    if difference:
        raise CheckFailed(
            f"{subject}: {difference} after a client replaced the state's tensors by copies",
            "ZeRO writes opt.state[p], Lightning moves it to a device: a list of tensors kept from an earlier update "
            "then points to memory that nobody else sees",
            "Build lists of parameters and state anew at every update",
        )


def _through_pickle(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


@check("optimizer", "wrapper", presumes=(REPEATS,))
def copies_and_pickles(subject: StackSubject) -> None:
    """`copy.deepcopy` and `pickle` give stacks that continue like the original and leave it alone."""
    model, opt = subject.pair()
    subject.train(model, opt, 0, MIDDLE)
    model.zero_grad(set_to_none=True)  # a gradient with a graph cannot be copied
    copiers: dict[str, Callable[[Any], Any]] = {"copy.deepcopy": copy.deepcopy, "pickle": _through_pickle}
    twins = {}
    for how, twin in copiers.items():
        try:
            twins[how] = twin((model, opt))
        except Exception as error:
            raise CheckFailed(
                f"{subject}: {how} raised {type(error).__name__}: {str(error)[:200]}",
                "Averaging, data loaders and distributed launchers copy the optimizer with its model",
                "Keep no lambdas, locks, files or generators in attributes",
            ) from error
    expected = subject.train(model, opt, MIDDLE, STEPS)
    for how, (twin_model, twin_opt) in twins.items():
        difference = subject.parting(expected, subject.train(twin_model, twin_opt, MIDDLE, STEPS), MIDDLE + 1)
        if difference:
            raise CheckFailed(
                f"{subject}, copied by {how} after step {MIDDLE}: {difference}",
                "A copy that trains otherwise is not a copy",
                "Keep what changes in the groups and the state; nothing that points to the original's tensors",
            )
