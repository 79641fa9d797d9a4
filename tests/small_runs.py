"""Small deterministic training runs, for tests that compare two of them."""

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
