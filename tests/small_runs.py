"""Small deterministic training runs, for tests that compare two of them."""

import copy
import io
from collections.abc import Callable, Iterable
from typing import Any

import torch


def small_model(seed: int = 0, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Return a network of two layers, its weights drawn from the seed."""
    torch.manual_seed(seed)
    layers = torch.nn.Linear(3, 4, bias=bias), torch.nn.Tanh(), torch.nn.Linear(4, 1, bias=bias)
    return torch.nn.Sequential(*layers).to(dtype)


def loss_of(model: torch.nn.Module, step: int) -> torch.Tensor:
    """Return the loss on data that depend on the number of the step alone."""
    generator = torch.Generator().manual_seed(step)
    first = next(model.parameters())
    data = torch.randn(8, 3, generator=generator).to(first.dtype)
    return (model(data) - 1.0).abs().pow(2).mean()


def fill_gradients(model: torch.nn.Module, step: int) -> None:
    """Leave the gradients of one step in the parameters."""
    model.zero_grad()
    loss_of(model, step).backward()


def train(
    model: torch.nn.Module,
    opt: torch.optim.Optimizer,
    steps: Iterable[int],
    *,
    call: Callable[[], Any] | None = None,
    after: Callable[[], Any] | None = None,
) -> None:
    """Make the steps with these numbers; `call` stands in for `opt.step`, `after` follows each."""
    for step in steps:
        opt.zero_grad()
        loss_of(model, step).backward()
        (call or opt.step)()
        if after is not None:
            after()


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return copies of the weights."""
    return [p.detach().clone() for p in model.parameters()]


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    """Hold that two models agree in every bit of every weight."""
    torch.testing.assert_close(weights(a), weights(b), rtol=0, atol=0, equal_nan=True)


def assert_same(found: Any, expected: Any, where: str = "it") -> None:
    """Hold that two nested structures agree: tensors in dtype and every bit, everything else by equality."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor), where
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), where
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{where}: {m}")
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}, {key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert type(found) is type(expected), where
        assert found == expected, where


def everything(model: torch.nn.Module, opt: Any) -> Any:
    """Return a copy of all that a step may change."""
    return copy.deepcopy((model.state_dict(), opt.state_dict(), list(opt._run.constructor_state.values()), opt.updates))


def through_a_file(saved: Any) -> Any:
    """Return what comes back from torch.save and a torch.load that runs no code."""
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)
