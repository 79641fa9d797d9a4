"""Checks of what a part declares: hyperparameters, bounds, state, documentation, text."""

import inspect
from typing import Any

import torch

from metaopt.errors import HyperparameterError, MetaoptError, did_you_mean
from metaopt.hyperparameters import Hyperparameter
from metaopt.misuse.no_hook import acts, nearly_a_hook
from metaopt.specs.pipeline import part
from metaopt.testing.allowed_values import allowed
from metaopt.testing.feeding import STEPS
from metaopt.testing.outcome import REPEATS, CheckFailed, check
from metaopt.testing.subject import StackSubject, Subject, refused
from metaopt.wrapper import HOOKS

FEW = 3


@check("wrapper", "schedule", "logger", "problem")
def says_what_it_does(subject: Subject) -> None:
    """The class has a docstring, and every hyperparameter a meaning."""
    target = subject.entry.target
    missing = [name for name, h in getattr(target, "hyperparameters", {}).items() if not h.doc]
    own = vars(target).get("__doc__") if inspect.isclass(target) else target.__doc__
    if not own or missing:
        what = f"hyperparameters without a doc: {', '.join(missing)}" if own else "no docstring"
        raise CheckFailed(
            f"{subject.entry.name} has {what}",
            "`metaopt list` and `metaopt show` print them, and errors quote them",
            'Write one sentence and the rule as a formula; hyper(..., doc="...")',
        )


@check("wrapper")
def acts_in_a_hook(subject: StackSubject) -> None:
    """The class defines a hook of the contract and no method nearly called like one, and acts while it is checked."""
    cls = subject.entry.target
    nearly = nearly_a_hook(cls)
    if nearly or not acts(cls):
        what = (
            f"defines {nearly}(), which the engine does not call" if nearly else f"defines none of {', '.join(HOOKS)}"
        )
        raise CheckFailed(
            f"{subject.label} {what}",
            "A wrapper acts where the engine calls it, and does nothing elsewhere without a word",
            f"{did_you_mean(nearly, HOOKS).strip()} Give a method of your own a name that begins with _"
            if nearly
            else "Define the hook that fits: the loss, the gradients, the updated weights, or an average",
        )
    name = cls.acts_every
    every = 1 if name is None else getattr(subject.wrapper_of(subject.pair()[1]), name)
    if every > STEPS:
        raise CheckFailed(
            f"{subject.label} acts every {every} updates, and a check makes {STEPS}",
            "Nothing that it does was tried",
            f"Give it an Example in which it acts several times, such as "
            f'metaopt_examples: {{"{subject.entry.name}": Example("{subject.entry.name}({name}=2)")}}',
        )


@check("optimizer", "wrapper", presumes=(REPEATS,))
def text_rebuilds_the_stack(subject: StackSubject) -> None:
    """`str(opt.spec)` is text from which the same stack is built, which trains the same way bit for bit."""
    _, opt = subject.pair()
    text = str(opt.spec)
    again_model, again = subject.pair(spec=text)
    if str(again.spec) != text:
        raise CheckFailed(
            f"{subject}: the text {text!r} builds a stack that calls itself {str(again.spec)!r}",
            "A run is known by its text",
            "Keep hyperparameters as they were given; do not change the group's values at construction",
        )
    difference = subject.parting(subject.run.weights[1:], subject.train(again_model, again, 0, STEPS), 1)
    if difference:
        raise CheckFailed(
            f"{subject}: {difference} in the stack that its own text {text!r} builds",
            "A run is known by its text",
            "Make every setting that matters a hyperparameter",
        )


@check("optimizer", "wrapper", "schedule", "logger", "problem")
def holds_its_bounds(subject: Subject) -> None:
    """What lies outside a declared bound is refused by name, and what is allowed never ends in a Python error."""
    target = subject.entry.target
    if ":" in subject.entry.name:  # a problem in a user's module, under no name of its own
        hyperparameters = getattr(target, "hyperparameters", {})
    else:
        hyperparameters = part(subject.entry.name, subject.entry.kind).hyperparameters
    for name, hyperparameter in hyperparameters.items():
        for value in _outside(hyperparameter):
            _is_refused(subject, target, name, value, hyperparameter)
    if isinstance(subject, StackSubject) and subject.entry.kind == "wrapper":
        subject.train(*subject.pair(), 0, FEW)  # what fails here is no matter of bounds
        for name, hyperparameter in hyperparameters.items():
            for value in (0, -1):
                _is_harmless(subject, name, value, hyperparameter)


def _outside(hyperparameter: Hyperparameter) -> list[Any]:
    """Return a value just beyond each declared bound, and what is not a number where a number is asked for."""
    beyond: list[Any] = []
    whole = hyperparameter.type is int
    step = 1 if whole else 1e-6
    if hyperparameter.ge is not None:
        beyond.append(hyperparameter.ge - step)
    if hyperparameter.gt is not None:
        beyond.append(hyperparameter.gt)
    if hyperparameter.le is not None:
        beyond.append(hyperparameter.le + step)
    if hyperparameter.lt is not None:
        beyond.append(hyperparameter.lt)
    if hyperparameter.choices is not None:
        beyond.append("no such choice")
    if hyperparameter.type in (int, float):
        beyond = [int(value) if whole else float(value) for value in beyond] + [float("nan")]
    return beyond


def _is_refused(subject: Subject, target: Any, name: str, value: Any, hyperparameter: Hyperparameter) -> None:
    found = part(subject.entry.name, subject.entry.kind)
    try:
        if subject.entry.kind == "optimizer":
            found(**{name: value})
        else:
            # the class itself, not the part, which would check before the class can
            required = {n: h for n, h in found.hyperparameters.items() if h.required and n != name}
            target(**{n: allowed(h) for n, h in required.items()}, **{name: value})
    except HyperparameterError as error:
        if name in str(error):
            return
        raise CheckFailed(
            f"{subject.entry.name}({name}={value!r}) is refused with {str(error)!r}, which does not name {name}",
            "A user must find the mistake in the message",
            "Let the base class check what is declared; name the hyperparameter in errors of your own",
        ) from error
    except (MetaoptError, TypeError, ValueError) as error:
        raise CheckFailed(
            f"{subject.entry.name}({name}={value!r}) ends in {type(error).__name__}: {error}",
            "A user's mistake is one clear HyperparameterError",
            "Call super().__init__(*args, **kwargs) first: it checks what is declared",
        ) from error
    raise CheckFailed(
        f"{subject.entry.name} takes {name}={value!r}, though it declares {hyperparameter.bounds() or 'a number'}",
        "A bound that does not hold misleads: the run fails later, or trains something else",
        "Call super().__init__(*args, **kwargs) in an __init__ of your own, or leave it out: the base class checks",
    )


def _is_harmless(subject: StackSubject, name: str, value: Any, hyperparameter: Hyperparameter) -> None:
    if hyperparameter.type not in (int, float, int | None, float | None, int | float):
        return
    try:
        hyperparameter.validate(value, where=subject.label)
        model, opt = subject.pair(spec=subject.with_given(**{name: value}))
        subject.train(model, opt, 0, FEW)
    except CheckFailed as error:
        if refused(error.__cause__ or error):
            return
        cause = error.__cause__ or error
        raise CheckFailed(
            f"{subject.label} takes {name}={value!r}, and then a step raised {type(cause).__name__}: {cause}",
            "A user's mistake belongs to the moment at which it is written, with the bounds in the message",
            f"Declare the bounds: {name} = hyper(..., ge=1) or gt=0.0",
        ) from error
    except MetaoptError:
        return


@check("wrapper")
def object_is_configuration(subject: StackSubject) -> None:
    """The wrapper object and its class stay as they were made: what changes lives in the groups and the state."""
    model, opt = subject.pair()
    wrapper = subject.wrapper_of(opt)
    before = {name: repr(value) for name, value in vars(wrapper).items()}
    shared = {name: repr(value) for name, value in _class_attributes(type(wrapper)).items()}
    failure: CheckFailed | None = None
    try:
        subject.train(model, opt, 0, STEPS)
    except CheckFailed as error:
        failure = error
    names = [f"self.{n}" for n, value in vars(wrapper).items() if before.get(n) != repr(value)]
    names += [
        f"{type(wrapper).__name__}.{n}"
        for n, value in _class_attributes(type(wrapper)).items()
        if shared.get(n) != repr(value)
    ]
    if names:
        raise CheckFailed(
            f"{subject.label} changes {', '.join(names)} while it runs",
            "One object may serve two stacks, and no checkpoint sees an attribute: the run after a restart is another",
            "Keep tensors in the state (anchor(), start(), zeros()), take the count from group.updates",
        )
    if failure:
        raise failure


def _class_attributes(cls: type) -> dict[str, Any]:
    kinds = (list, dict, set, int, float, torch.Tensor)
    return {n: v for n, v in vars(cls).items() if isinstance(v, kinds) and not n.startswith("__")}
