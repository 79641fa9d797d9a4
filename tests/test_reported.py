"""Reported faults of a step, its groups, its schedules and its log, each as the behaviour that is right."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import metaopt


class Recorded(metaopt.Logger):
    """A log in memory: the spec and the hyperparameters that it was opened with, and its points."""

    def __init__(self) -> None:
        self.spec = ""
        self.hparams: dict[str, Any] = {}
        self.points: list[tuple[int, dict[str, float]]] = []

    def open(self, *, step: int, tags: Any, spec: str, hparams: Any) -> None:
        self.spec, self.hparams = spec, dict(hparams)

    def scalars(self, step: int, values: Any) -> None:
        self.points.append((step, dict(values)))


def parameters(count: int = 2, dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.full((3,), 1.0 + i, dtype=dtype)) for i in range(count)]


def fill(params: list[torch.nn.Parameter], step: int = 0) -> None:
    for p in params:
        p.grad = torch.full_like(p, 0.5 + 0.1 * step)


# ---- closures


def quiet_closure(p: torch.nn.Parameter, calls: list[int]) -> Callable[[], None]:
    """Return a closure that leaves gradients and returns nothing, as torch allows."""

    def closure() -> None:
        calls.append(1)
        p.grad = None
        p.square().sum().backward()

    return closure


@pytest.mark.parametrize("spec", [[], "lookahead(k=2)", "clip_grad_norm(100.0)"], ids=str)
def test_a_closure_that_returns_nothing_is_evaluated_once_per_step(spec: Any) -> None:
    (p,) = parameters(1)
    opt = metaopt.wrap(torch.optim.SGD([p], lr=0.1), spec)
    calls: list[int] = []
    for step in range(1, 4):
        opt.step(quiet_closure(p, calls))
        assert (len(calls), opt.updates) == (step, step)


def test_two_evaluations_that_return_nothing_make_one_update_under_accumulate_of_two() -> None:
    (p,) = parameters(1)
    opt = metaopt.wrap(torch.optim.SGD([p], lr=0.1), "accumulate(2)")
    calls: list[int] = []
    for _ in range(4):
        opt.step(quiet_closure(p, calls))
    assert (len(calls), opt.updates) == (4, 2)
    # p <- p - 0.1 * 2 p, twice
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.64, dtype=torch.float64), rtol=1e-12, atol=0.0)


# ---- groups


def run_sgd(make: Callable[[list[Any]], Any], groups: Any, set_later: dict[str, float]) -> list[Any]:
    """Make six steps; set entries of the first group after two; the last parameter has gradients from the fifth on."""
    params = parameters(3)
    opt = make([{**entries, "params": [params[i] for i in members]} for members, entries in groups])
    for step in range(6):
        fill(params, step)
        if step < 4:
            params[-1].grad = None
        if step == 2:
            opt.param_groups[0].update(set_later)
        opt.step()
    return [p.detach() for p in params]


SGD_RUNS: dict[str, tuple[Any, dict[str, float]]] = {
    "in the group": ([((0, 1, 2), {"momentum": 0.9})], {}),
    "in one group of two": ([((0,), {}), ((1, 2), {"momentum": 0.9})], {}),
    "set later": ([((0, 1, 2), {})], {"momentum": 0.9}),
}


@pytest.mark.parametrize(("groups", "set_later"), SGD_RUNS.values(), ids=SGD_RUNS.keys())
def test_sgd_with_momentum_from_a_group_takes_a_parameter_whose_first_gradient_comes_late(
    groups: Any, set_later: dict[str, float]
) -> None:
    found = run_sgd(lambda given: metaopt.build(given, "sgd(lr=0.1)"), groups, set_later)
    expected = run_sgd(lambda given: torch.optim.SGD(given, lr=0.1), groups, set_later)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def unlike_groups(log: metaopt.Logger | None = None) -> Any:
    """Return a stack whose first group has a rate and a period of its own."""
    a, b = parameters(2)
    groups = [{"params": [a], "lr": 0.5, "lookahead.k": 3}, {"params": [b]}]
    opt = metaopt.build(groups, "adamw(lr=0.125) | lookahead(k=7)", log=log, log_every=1)
    fill([a, b])
    opt.step()
    return opt


def test_a_pipeline_is_told_with_the_values_of_the_stack_and_not_of_its_first_group() -> None:
    told = str(unlike_groups().spec)
    assert re.search(r"adamw\([^)]*lr=0\.125", told), told
    assert re.search(r"lookahead\([^)]*k=7", told), told
    assert not re.search(r"adamw\([^)]*lr=0\.5\b", told), told
    assert not re.search(r"lookahead\([^)]*k=3\b", told), told


def test_a_log_is_told_the_values_of_the_stack_and_not_of_its_first_group() -> None:
    log = Recorded()
    unlike_groups(log)
    assert log.hparams["lr"] == 0.125
    assert log.hparams["lookahead.k"] == 7


def test_a_rate_that_is_a_tensor_is_told_as_its_value() -> None:
    log = Recorded()
    (p,) = parameters(1)
    opt = metaopt.build([p], [metaopt.adamw(lr=torch.tensor(0.125))], log=log, log_every=1)
    fill([p])
    opt.step()
    assert "lr=0.125" in str(opt.spec)
    assert log.hparams["lr"] == 0.125


def test_printing_a_stack_shows_the_pipeline_and_the_groups_as_torch_shows_them() -> None:
    a, b = parameters(2)
    opt = metaopt.build([{"params": [a], "lr": 0.25}, {"params": [b]}], "adamw(lr=0.125) | lookahead(k=7)")
    told = repr(opt)
    assert "adamw(lr=0.125)" in told and "lookahead(k=7)" in told
    for group, rate in enumerate((0.25, 0.125)):
        assert re.search(rf"Parameter Group {group}\n(.*\n)*?\s+lr: {rate}\n", told), told
    assert "weight_decay: 0.01" in told


# ---- declarations


@pytest.mark.parametrize("name", ["updates", "norms", "params", "grads", "label"])
@pytest.mark.parametrize("declare", [lambda: metaopt.hyper(1.0), metaopt.zeros, metaopt.anchor, metaopt.counter])
def test_a_declaration_with_the_name_of_an_attribute_is_refused_when_the_class_is_made(
    declare: Callable[[], Any], name: str
) -> None:
    with pytest.raises(metaopt.HyperparameterError, match=name):
        type("Own", (metaopt.Wrapper,), {"__annotations__": {name: float}, name: declare()})


def test_a_wrapper_may_compare_with_the_weights_before_the_update_and_keep_an_average() -> None:
    class Halfway(metaopt.Wrapper):
        before = metaopt.previous()
        average = metaopt.start()

        def after_update(self, group: metaopt.Group) -> None:
            halfway = torch._foreach_add(group.before, group.params)
            torch._foreach_copy_(group.average, torch._foreach_mul(halfway, 0.5))

        def averaged(self, group: metaopt.Group) -> list[torch.Tensor]:
            average: list[torch.Tensor] = group.average
            return average

    (p,) = parameters(1)
    opt = metaopt.wrap(torch.optim.SGD([p], lr=1.0), Halfway())
    for step in range(3):
        fill([p])
        opt.step()
        with opt.averaged():
            torch.testing.assert_close(p.detach(), torch.full_like(p, 1.0 - 0.5 * step - 0.25).detach())
        torch.testing.assert_close(p.detach(), torch.full_like(p, 1.0 - 0.5 * (step + 1)).detach())


# ---- schedules


@pytest.mark.parametrize(
    ("spec", "part", "name", "bound"),
    [
        ("sgd(lr=0.1) | lookahead(alpha=linear(0.5, -1.0, 2))", "lookahead", "alpha", "> 0"),
        ("sgd(lr=0.1) | ema(decay=linear(0.9, 1.5, 4))", "ema", "decay", "< 1"),
        ("sgd(lr=0.1) | ema(decay=linear(0.9, 1.5))", "ema", "decay", "< 1"),
        # in bounds at both ends of the run
        ("sgd(lr=0.1) | ema(decay=cyclic(0.5, 1.5, up=5))", "ema", "decay", "< 1"),
        ("clip_grad_norm(cosine(1.0, -1.0)) | sgd(lr=0.1)", "clip_grad_norm", "max_norm", ">"),
    ],
)
def test_a_schedule_that_leaves_the_bounds_is_refused_when_the_stack_is_built(
    spec: str, part: str, name: str, bound: str
) -> None:
    with pytest.raises(metaopt.HyperparameterError) as raised:
        metaopt.build(parameters(1), spec, total_steps=10)
    told = str(raised.value)
    assert part in told and name in told and bound in told, told
    values = [float(number) for number in re.findall(r"-?\d+\.\d+", told)]
    assert any(value < 0.0 or value >= 1.0 for value in values), f"no value out of bounds in: {told}"


# ---- cost


@contextmanager
def counted_calls() -> Iterator[list[int]]:
    """Count the calls of metaopt's own functions."""
    home = os.path.dirname(metaopt.__file__) + os.sep
    calls = [0]

    def count(frame: Any, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(home):
            calls[0] += 1

    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def calls_per_step(tensors: int, *, without: int) -> int:
    """Return how many functions of metaopt a step calls when so many parameters never have a gradient."""
    params = parameters(tensors)
    opt = metaopt.build(params, "clip_grad_norm(1.0) | adamw(lr=0.1) | lookahead(k=100)")
    for _ in range(3):
        fill(params[without:])
        opt.step()
    fill(params[without:])
    with counted_calls() as calls:
        opt.step()
    assert opt.updates == 4
    return calls[0]


@pytest.mark.parametrize("tensors", [150, 1000])
def test_a_parameter_without_a_gradient_makes_a_step_call_hardly_more_functions(tensors: int) -> None:
    all_have_one = calls_per_step(tensors, without=0)
    assert calls_per_step(tensors, without=1) <= 1.3 * all_have_one


class Norms(TorchDispatchMode):
    """Counts the norms that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "norm" in str(func):
            self.taken.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("behind", ["", " | ema"])
def test_without_a_log_no_update_takes_a_norm(behind: str) -> None:
    params = parameters(2)
    opt = metaopt.build(params, f"sgd(lr=0.001){behind}")
    with Norms() as norms:
        for step in range(100):
            fill(params, step)
            opt.step()
    assert norms.taken == []


# ---- the loss


@pytest.mark.parametrize("loss", [3, numpy.int64(3)], ids=["int", "numpy"])
def test_a_loss_that_is_an_integer_is_logged(loss: Any) -> None:
    log = Recorded()
    (p,) = parameters(1)
    opt = metaopt.build([p], "sgd(lr=0.1)", log=log, log_every=1)

    def closure() -> Any:
        fill([p])
        return loss

    assert opt.step(closure) is loss
    assert opt.metrics()["train/loss"] == 3.0
    (point,) = log.points
    assert point[1]["train/loss"] == 3.0
