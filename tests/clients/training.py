"""The model and the data that the tests of clients train with: a batch depends on its number alone."""

import torch
from torch import nn

import metaopt

ROWS = 8


def small_model(seed: int = 0) -> nn.Sequential:
    """Return a network with shapes that two ranks cannot share evenly: 5 rows, and a bias of one element."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def batch(step: int) -> torch.Tensor:
    return torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return (model(rows) - rows.sum(1, keepdim=True)).square().mean()


def train(model: nn.Module, opt: torch.optim.Optimizer, first: int, last: int) -> None:
    """Make updates `first` to `last - 1`; with several ranks each takes its share of every batch."""
    for step in range(first, last):

        def closure(step: int = step) -> torch.Tensor:
            opt.zero_grad()
            loss = loss_of(model, share(batch(step), model))
            loss.backward()
            return loss

        if isinstance(opt, metaopt.Stack) and opt._run.structure.around:  # it evaluates the loss itself
            opt.step(closure)
        else:
            closure()
            opt.step()


def share(rows: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """Return this rank's share of a batch; all of it for a model that no rank shares."""
    if not hasattr(model, "reducer") and not any(hasattr(p, "to_local") for p in model.parameters()):
        return rows  # a model that no rank shares
    each = ROWS // torch.distributed.get_world_size()
    return rows[torch.distributed.get_rank() * each :][:each]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor, gathered where the ranks hold shards of it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def weights(model: nn.Module) -> list[torch.Tensor]:
    """Return copies of all weights, whole."""
    return [whole(p.detach()).clone() for p in model.parameters()]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Assert equality bit for bit."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
