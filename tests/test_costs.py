"""What an update and a checkpoint cost, counted: calls of torch and of functions, which no busy machine changes.

Bytes that an update moves are counted in `tests/benchmarks/test_measuring.py`, launches on an accelerator in
`tests/test_launches.py`.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import metaopt
from metaopt.lab.shapes import shapes_of
from metaopt.programs import kernels

FULL = "clip_grad_norm(1.0) | adamw(lr=0.01) | lookahead(k=5)"
HOME = os.path.dirname(metaopt.__file__) + os.sep


def parameters(shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.ones_like(p)
    return params


def tiny() -> list[torch.nn.Parameter]:
    return parameters([shape for _, shape in shapes_of("tiny")])


class Calls(TorchDispatchMode):
    """Counts what is called of torch, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.by_name[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


def functions_called(work: Callable[[], Any]) -> tuple[int, int]:
    """Return how many functions are called: of metaopt's own, and of all kinds, those in C included."""
    own = every = 0

    def count(frame: Any, event: str, argument: object) -> None:
        nonlocal own, every
        if event in ("call", "c_call"):
            every += 1
            own += event == "call" and frame.f_code.co_filename.startswith(HOME)

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return own, every


@pytest.mark.parametrize(("update", "most"), [(9, 10), (10, 12)])
def test_the_full_stack_calls_torch_no_more_often_than_it_did(update: int, most: int) -> None:
    # the norm 3, the factor 5, the counts and the kernel; two more at the pull of every fifth update
    opt = metaopt.build(tiny(), FULL)
    for _ in range(update - 1):
        opt.step()
    with Calls() as calls:
        opt.step()
    assert sum(calls.by_name.values()) <= most, calls.by_name


@pytest.mark.parametrize(("steps", "calls"), [(1, []), (2, ["_foreach_copy_", "_foreach_add_", "_foreach_div_"])])
def test_accumulate_copies_the_first_gradient_of_a_window_and_takes_an_only_one_as_it_is(
    steps: int, calls: list[str]
) -> None:
    shapes = [shape for _, shape in shapes_of("tiny")]
    params = parameters(shapes)
    opt, plain = metaopt.build(params, f"accumulate({steps}) | sgd(lr=0.1)"), metaopt.build(tiny(), "sgd(lr=0.1)")

    def window() -> Counter[str]:
        with Calls() as watched:
            for _ in range(steps):
                for p in params:
                    p.grad = torch.ones_like(p)
                opt.step()
        return watched.by_name

    window(), plain.step()
    with Calls() as base:
        plain.step()
    added = window() - base.by_name
    assert sorted(name for name in added.elements() if "_foreach_" in name) == sorted(f"aten::{c}" for c in calls)


@pytest.mark.parametrize(("frozen", "most"), [(False, 126), (True, 126)])
def test_an_update_calls_no_more_functions_than_it_did(frozen: bool, most: int) -> None:
    params = tiny()
    opt = metaopt.build(params, FULL)
    for _ in range(6):
        opt.step()
    if frozen:
        params[0].requires_grad_(False)
        params[0].grad = None
        opt.step()
    own, _ = functions_called(opt.step)
    # with the library, a group that is not that of the update before is asked twice more whether it fits
    assert own <= most + 2 * (frozen and kernels() is not None)


def more_functions(tensors: int, work: Callable[[list[torch.nn.Parameter]], list[Callable[[], Any]]]) -> float:
    """Return how many functions a stack calls beyond torch's optimizer, for each parameter more."""
    counts = []
    for number in (tensors, 2 * tensors):
        of_stack, of_torch = (functions_called(call)[1] for call in work(parameters([(2,)] * number)))
        counts.append(of_stack - of_torch)
    return (counts[1] - counts[0]) / tensors


def build(params: list[torch.nn.Parameter]) -> list[Callable[[], Any]]:
    metaopt.build(params, FULL)  # imports what the first one imports
    return [lambda: metaopt.build(params, FULL), lambda: torch.optim.AdamW(params, fused=True)]


def updated(params: list[torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
    optimizers = [metaopt.build(params, FULL), torch.optim.AdamW(params, fused=True)]
    for opt in optimizers:
        opt.step()
    return optimizers


def save(params: list[torch.nn.Parameter]) -> list[Callable[[], Any]]:
    return [opt.state_dict for opt in updated(params)]


def load(params: list[torch.nn.Parameter]) -> list[Callable[[], Any]]:
    own, bare = updated(params)
    saved, of_bare = own.state_dict(), bare.state_dict()
    own.load_state_dict(saved)
    return [lambda: own.load_state_dict(saved), lambda: bare.load_state_dict(of_bare)]


@pytest.mark.parametrize(("work", "most"), [(build, 6), (save, 2), (load, 66)], ids=lambda x: getattr(x, "__name__", x))
def test_a_parameter_more_makes_a_stack_call_few_functions(
    work: Callable[[list[torch.nn.Parameter]], list[Callable[[], Any]]], most: float
) -> None:
    assert more_functions(100, work) <= most
