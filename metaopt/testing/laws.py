"""Checks of the contract's laws: no waiting for the device, order of anchors, what stands in front of the base."""

import inspect
from contextlib import nullcontext
from typing import Any

from metaopt.errors import MetaoptError
from metaopt.group import Group
from metaopt.hyperparameters import hyper
from metaopt.slots import anchor
from metaopt.specs.pipeline import Pipeline, as_pipeline
from metaopt.testing.comparing import same
from metaopt.testing.feeding import STEPS
from metaopt.testing.outcome import CheckFailed, NotApplicable, check
from metaopt.testing.subject import StackSubject, refused, weights
from metaopt.testing.watching import Descent, FunctionWatch, OperatorWatch, waits_raise
from metaopt.wrapper import Wrapper


@check("optimizer", "wrapper")
def waits_for_no_device(subject: StackSubject) -> None:
    """A step reads no value from the device: the host never waits for it."""
    model, opt = subject.pair()
    if any(wrapper.syncs_device for wrapper in opt.wrappers):
        raise NotApplicable("it declares that it waits for the device (syncs_device = True)")
    descent = Descent(model.parameters(), inspect.getsourcefile(subject.entry.target) or "")
    plain = opt.step

    def watched(closure: Any = None) -> Any:
        descent.add([p.grad for p in model.parameters()])
        on_the_device = waits_raise() if subject.device.type == "cuda" else nullcontext()
        with FunctionWatch(descent), OperatorWatch(descent), on_the_device:
            return plain(closure) if closure is not None else plain()

    opt.step = watched  # type: ignore[assignment, method-assign]
    subject.train(model, opt, 0, STEPS // 2)
    if descent.reads:
        others = f" (and {len(descent.reads) - 1} more)" if len(descent.reads) > 1 else ""
        raise CheckFailed(
            f"{subject} reads from the device in {STEPS // 2} steps: {descent.reads[0]}{others}",
            "Each read waits until the device has done all its work, and keeps it idle afterwards",
            "Compute with 0-dim tensors (torch.where, clamp, a tensor factor) instead of .item(), float() or `if`; a "
            "wrapper that cannot do without sets syncs_device = True",
        )


class Witness(Wrapper):
    """Keeps an anchor and notes the weights that it sees: an instrument of the check, not a part."""

    strength: float = hyper(1.0, doc="nothing")
    kept = anchor()

    def after_update(self, group: Group) -> None:
        for p, seen in zip(group.params, group.kept, strict=True):
            self.__dict__.setdefault("noted", {})[p.data_ptr()] = (p.clone(), seen)


@check("wrapper")
def tells_when_it_moves_the_weights(subject: StackSubject) -> None:
    """A wrapper that moves the parameters does so through `group.set_params`: anchors nearer the base follow."""
    if "after_update" not in subject.entry.target.implemented_hooks():
        raise NotApplicable("it does not act after the update")
    parts = list(subject.pipeline)
    at = next(i for i, part in enumerate(parts) if part.kind == "optimizer")
    witness = as_pipeline(Witness(label="witness"))
    spec = Pipeline((*parts[: at + 1], *witness.parts, *parts[at + 1 :]))
    model, opt = subject.pair(spec=spec)
    noted: dict[int, Any] = {}
    next(w for w in opt.wrappers if w.label == "witness").__dict__["noted"] = noted
    for number in range(STEPS):
        noted.clear()
        subject.train(model, opt, number, number + 1)
        for p in model.parameters():
            if p.data_ptr() not in noted:
                continue
            before, kept = noted[p.data_ptr()]
            moved = not same(before, p.detach())
            if moved and not same(kept, p.detach()):
                raise CheckFailed(
                    f"{subject} moved the parameters without saying so: after step {number + 1} the anchor of a "
                    f"wrapper nearer the base stayed behind",
                    "A Lookahead inside this one would pull the weights back to where they no longer belong",
                    "Write group.set_params(tensors) instead of copying into group.params",
                )


@check("wrapper")
def leaves_the_weights_to_the_base(subject: StackSubject) -> None:
    """What a wrapper does to the weights while the loss is evaluated is undone exactly before the base updates them."""
    if not {"around", "on_gradients"} & subject.entry.target.implemented_hooks():
        raise NotApplicable("it acts neither on the evaluation nor on the gradients")
    if "after_update" in subject.entry.target.implemented_hooks():
        raise NotApplicable("it also acts on the updated weights")
    model = subject.model()
    parts = [part if part.kind == "wrapper" else as_pipeline("sgd(lr=0.0)").parts[0] for part in subject.pipeline]
    opt = subject.stack(list(model.named_parameters()), Pipeline(tuple(parts)))
    before = weights(model)
    subject.train(model, opt, 0, STEPS)
    if not same(before, weights(model)):
        raise CheckFailed(
            f"{subject}: with a base that does nothing (sgd at a rate of 0) the weights change",
            "A perturbation that is undone by subtracting it leaves its rounding behind at every step",
            "Keep a copy of the weights while you perturb them and copy it back, also when the closure raises",
        )


@check("wrapper")
def works_or_refuses_where_the_loss_is_evaluated_again(subject: StackSubject) -> None:
    """Over L-BFGS, which evaluates the loss several times in a step, a wrapper trains or is refused with the reason."""
    parts = [
        part if part.kind == "wrapper" else as_pipeline("lbfgs(lr=0.1, max_iter=3)").parts[0]
        for part in subject.pipeline
    ]
    over = type(subject)(subject.entry, subject.example, " | ".join(map(str, parts)), subject.device)
    try:
        model, opt = over.pair()
        over.train(model, opt, 0, 3)
    except CheckFailed as error:
        if refused(error.__cause__ or error):
            return
        raise
    except MetaoptError as error:
        if len(str(error)) < 20:
            raise CheckFailed(
                f"{over} is refused with {str(error)!r}", "A refusal needs its reason", "Say why in validate()"
            ) from error
        return
    for p in model.parameters():
        if not bool(p.isfinite().all()):
            raise CheckFailed(
                f"{over}: a parameter is not finite after 3 steps",
                "What a wrapper on gradients does is done at every evaluation of the loss",
                "Keep nothing between evaluations; or refuse such a base in validate()",
            )
