"""Checks of the state: whole from the first step, with memory of its own, and declared."""

from typing import Any

import torch

from metaopt.engine.run.entries import STEP_CALLS
from metaopt.stack import Stack
from metaopt.testing.comparing import tensors
from metaopt.testing.feeding import STEPS, Halves
from metaopt.testing.outcome import CheckFailed, check
from metaopt.testing.subject import StackSubject


@check("optimizer", "wrapper")
def state_is_whole_at_the_first_step(subject: StackSubject) -> None:
    """The first step makes every entry of the state, also with zero gradients and a rate of 0; none comes later."""
    first, *later = [_keys(saved["opt"]) for saved in subject.run.checkpoints[1:]]
    for step, keys in enumerate(later, 2):
        _no_more(subject, first, "the first step", keys, f"step {step}")
    model, opt = subject.pair(spec=_at_rate_zero(subject))

    def closure() -> torch.Tensor:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
            if subject.example.gradients == "sparse":
                p.grad = p.grad.to_sparse(1)
            elif subject.example.gradients == "graph":
                p.grad = (p * 0.0).sum() + p.grad
        return torch.zeros(())

    closure()
    try:
        opt.step(closure if subject.calls_closure else None)
    except Exception as error:
        raise CheckFailed(
            f"{subject}: a step with zero gradients and a rate of 0 raised {type(error).__name__}: {str(error)[:200]}",
            "Distributed checkpoint makes state appear by just such a step",
            "Guard divisions by norms",
        ) from error
    _no_more(subject, _keys(opt.state_dict()), "a first step with zero gradients and a rate of 0", first, "any other")


def _keys(state_dict: dict[str, Any]) -> dict[int, set[str]]:
    return {i: {str(key) for key in held} for i, held in state_dict["state"].items() if isinstance(held, dict)}


def _no_more(
    subject: StackSubject, early: dict[int, set[str]], what: str, late: dict[int, set[str]], then: str
) -> None:
    for position, keys in late.items():
        missing = keys - early.get(position, set())
        if missing:
            raise CheckFailed(
                f"{subject}: {', '.join(sorted(missing))} of parameter {position} is in the state after {then}, not "
                f"after {what}",
                "A copy that is taken later starts where training already is (its first sync changes nothing), and "
                "distributed checkpoint loads only the entries that one step makes",
                "Make every entry at the parameter's first update (a wrapper: declare anchor(), start() or zeros())",
            )


def _at_rate_zero(subject: StackSubject) -> Any:
    parts = list(subject.pipeline)
    at = next(i for i, part in enumerate(parts) if part.kind == "optimizer")
    if "lr" not in parts[at].hyperparameters:
        return subject.pipeline
    built = subject.pair()[1].param_groups[0].get("lr")
    try:
        parts[at] = parts[at](lr=0.0 if isinstance(built, float) else built)
        pipeline = type(subject.pipeline)(tuple(parts))
        subject.pair(spec=pipeline)
    except Exception:  # some optimizers refuse a rate of 0: then the rate stays
        return subject.pipeline
    return pipeline


@check("optimizer", "wrapper")
def state_tensors_share_no_memory(subject: StackSubject) -> None:
    """Every tensor of the state has memory of its own: no alias of another entry, of a parameter or of a gradient."""
    model, opt = subject.pair()
    for number in range(STEPS):
        subject.step(model, opt, number)
        _no_alias(subject, model, opt)


def _no_alias(subject: StackSubject, model: Halves, opt: Stack) -> None:
    seen: dict[tuple[int, torch.device], str] = {}
    for position, p in enumerate(model.parameters()):
        owned = [(f"parameter {position}", p.detach())]
        if p.grad is not None and not p.grad.is_sparse:
            owned.append((f"the gradient of parameter {position}", p.grad))
        owned += tensors(opt.state.get(p, {}), f"the state of parameter {position} at ")
        for name, tensor in owned:
            if tensor.layout is not torch.strided or not tensor.numel():
                continue
            place = tensor.data_ptr(), tensor.device
            if place in seen:
                raise CheckFailed(
                    f"{subject}: {name} and {seen[place]} are the same memory",
                    "A change in place of one changes the other, and after loading they are two",
                    "Keep a copy: tensor.clone(), or torch._foreach_copy_(held, current)",
                )
            seen[place] = name


@check("wrapper")
def declares_what_it_keeps(subject: StackSubject) -> None:
    """State and groups gain only the declared entries, under the wrapper's label."""
    bare_model, bare = subject.pair(spec=subject.base_alone)
    subject.train(bare_model, bare, 0, 2)
    model, opt = subject.pair()
    failure: CheckFailed | None = None
    try:
        subject.train(model, opt, 0, STEPS)
    except CheckFailed as error:
        failure = error
    declared = tuple(f"{w.label}.{name}" for w in opt.wrappers for name in w.active_slots())
    known = {key for held in bare.state.values() for key in held}
    foreign = {
        str(key)
        for held in opt.state.values()
        for key in held
        if key not in known and not str(key).startswith(("metaopt.", *declared))
    }
    # the engine counts steps where replicas meet by them
    groups = {key for group in opt.param_groups for key in group} - {*bare.param_groups[0], STEP_CALLS}
    foreign |= groups - {
        f"{w.label}.{name}" for w in opt.wrappers for name in (*w.hyperparameters, *w.counters, *w.scalars)
    }
    if foreign:
        raise CheckFailed(
            f"{subject.label} keeps {', '.join(sorted(foreign))}, which it does not declare"
            + (f"; {failure.what}" if failure else ""),
            "A base such as Adam makes its state only where state[p] is empty, so an entry written before its first "
            "update breaks it; and what is not declared is not cast, moved, dropped or reported",
            "Declare it in the class body (name = anchor(), start(), zeros(), scalar(), ...) and read group.name",
        )
    if failure:
        raise failure
