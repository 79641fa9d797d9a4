"""Agreement with the author's own reference: the rule as a generator on plain float64 tensors, one parameter at a time.

An optimizer's reference gets the start and, for every step, a function that gives the gradient at a place:

    def sign_descent(x, gradients, *, lr):
        for gradient in gradients:
            x = x - lr * gradient(x).sign()
            yield x

A wrapper's gets the base's update too, so that it says nothing about the base:

    def pull(x, gradients, update, *, k, alpha):
        slow = x
        for t, gradient in enumerate(gradients, 1):
            x = update(x, gradient(x))
            if t % k == 0:
                slow = x = slow + alpha * (x - slow)
            yield x

It names the hyperparameters that it needs; it may yield `(x, average)`, where `opt.averaged()` must show the average.
A schedule's is `reference(t, total_steps, **hyperparameters)` and returns the value.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from metaopt.specs.pipeline import Pipeline, as_pipeline
from metaopt.stack import Stack
from metaopt.testing.outcome import CheckFailed, NotApplicable, check
from metaopt.testing.subject import StackSubject

STEPS = 20
RATE = 0.1  # of the gradient descent that a wrapper's reference is compared over
SHAPES = ((4, 3), (5,), ())
RELATIVE = 1e-12

Gradient = Callable[[torch.Tensor], torch.Tensor]


@check("optimizer", "wrapper")
def agrees_with_its_reference(subject: StackSubject) -> None:
    """The weights after every step are those of the author's reference on plain float64 tensors, to 1e-12."""
    reference = subject.example.reference
    if reference is None:
        raise NotApplicable("its author gives no reference; see metaopt.testing.references")
    matrices = subject.example.parameters == "matrices"
    for shape in SHAPES[:1] if matrices else SHAPES:
        start = torch.randn(shape, generator=_generator(0), dtype=torch.float64)
        expected = [pair if isinstance(pair, tuple) else (pair, None) for pair in _follow(subject, reference, start)]
        if len(expected) != STEPS:
            raise CheckFailed(
                f"{subject}: the reference yielded {len(expected)} times for {STEPS} gradients",
                "It has to say where the parameter is after every step",
                "Loop over `gradients` and yield once for each",
            )
        _compare(subject, start, expected)


def _follow(subject: StackSubject, reference: Callable[..., Any], start: torch.Tensor) -> Iterator[Any]:
    arguments: list[Any] = [start.clone(), list(_gradients(subject, start.shape))]
    if subject.entry.kind == "wrapper":
        arguments.append(lambda x, gradient: x - RATE * gradient)
    opt = _stack(subject, torch.nn.Parameter(start.clone()))
    wanted = list(inspect.signature(reference).parameters)[len(arguments) :]
    prefix = f"{subject.label}." if subject.label else ""
    given = {name: opt.param_groups[0][prefix + name] for name in wanted}
    return iter(reference(*arguments, **given))


def _stack(subject: StackSubject, x: torch.nn.Parameter) -> Stack:
    if subject.entry.kind == "optimizer":
        return subject.stack([x])
    descent = as_pipeline(f"sgd(lr={RATE})").parts[0]
    return subject.stack([x], Pipeline(tuple(part if part.kind == "wrapper" else descent for part in subject.pipeline)))


def _gradients(subject: StackSubject, shape: Sequence[int]) -> Iterator[Gradient]:
    """Yield the gradient of each step: given beforehand, or that of a quadratic where the loss is evaluated at will."""
    for number in range(STEPS):
        drawn = torch.randn(tuple(shape), generator=_generator(number + 1), dtype=torch.float64)
        curvature = torch.linspace(0.5, 1.5, drawn.numel(), dtype=torch.float64).reshape(tuple(shape))
        if subject.calls_closure:
            yield partial(_of_quadratic, curvature, drawn)
        else:
            # open loop: rounding does not feed back, so that agreement is to the last digits
            yield partial(_given, drawn)


def _of_quadratic(curvature: torch.Tensor, centre: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return curvature * x - centre


def _given(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return gradient.clone()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(7000 + seed)


def _compare(
    subject: StackSubject, start: torch.Tensor, expected: list[tuple[torch.Tensor, torch.Tensor | None]]
) -> None:
    x = torch.nn.Parameter(start.clone().to(subject.device))
    opt = _stack(subject, x)
    for number, (gradient, (place, average)) in enumerate(
        zip(_gradients(subject, start.shape), expected, strict=True), 1
    ):

        def closure(gradient: Gradient = gradient) -> torch.Tensor:
            x.grad = gradient(x.detach().cpu()).to(x.device)
            return x.detach().sum()

        if subject.calls_closure:
            opt.step(closure)
        else:
            closure()
            opt.step()
        _close(subject, x.detach(), place, f"after step {number}")
        if average is not None:
            with opt.averaged(subject.label):
                _close(subject, x.detach(), average, f"inside averaged() after step {number}")


def _close(subject: StackSubject, found: torch.Tensor, expected: torch.Tensor, when: str) -> None:
    found = found.cpu()
    error = (found - expected).abs().max()
    if found.shape != expected.shape or not bool(error <= RELATIVE * (1.0 + expected.abs().max())):
        raise CheckFailed(
            f"{subject} and its reference part {when}, over a parameter of shape {tuple(found.shape)}: "
            f"{found.flatten()[:3].tolist()} "
            f"and {expected.flatten()[:3].tolist()}, {float(error):.3g} apart",
            "The rule that is trained is not the rule that is written down",
            "Find out which of the two is wrong; compare them at that step by hand",
        )
