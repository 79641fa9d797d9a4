"""A physics-informed network: its loss is how far it is from an equation, with derivatives by autograd."""

from collections.abc import Iterator
from math import pi

import torch
from torch import nn

from metaopt import Problem, hookimpl, hyper


class Field(nn.Sequential):
    """A tanh network from (x, t) to u."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))


class Heat(Problem):
    """u_t = u_xx / 10 on the unit square from u = sin(pi x), u = 0 at the ends: a physics-informed network.

    The loss is the mean square of the residual plus 10 times that of the two conditions. doi:10.1016/j.jcp.2018.10.045
    """

    targets = {"loss": 0.0053}
    default_steps = 300
    batch_size: int = hyper(64, ge=1, doc="points inside, and as many at the border, in a batch")
    width: int = hyper(24, ge=1, doc="width of the network")

    def model(self, seed: int, device: torch.device | str = "cpu") -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Field(self.width).to(device)

    def batches(self, seed: int, device: torch.device | str = "cpu", start: int = 0) -> Iterator[torch.Tensor]:
        number = start
        while True:
            yield self._points(self.batch_size, 1_000_003 * (seed + 1) + number).to(device)
            number += 1

    def _points(self, count: int, seed: int) -> torch.Tensor:
        return torch.rand(2, count, 2, generator=torch.Generator().manual_seed(seed))

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        inside = batch[0].detach().requires_grad_()
        u = model(inside)
        first = torch.autograd.grad(u.sum(), inside, create_graph=True)[0]
        second = torch.autograd.grad(first[:, 0].sum(), inside, create_graph=True)[0]
        residual = first[:, 1] - second[:, 0] / 10
        start, end = batch[1].chunk(2)
        at_start = torch.stack([start[:, 0], torch.zeros_like(start[:, 0])], 1)
        at_ends = torch.stack([end[:, 0].round(), end[:, 1]], 1)
        conditions = (model(at_start)[:, 0] - (pi * start[:, 0]).sin()).square().mean() + model(at_ends).square().mean()
        loss: torch.Tensor = residual.square().mean() + 10 * conditions
        return loss

    def evaluate(self, model: nn.Module, split: str = "validation") -> dict[str, float]:
        device = next(model.parameters()).device
        with torch.enable_grad():
            loss = self.loss(model, self._points(500, {"validation": 1, "test": 2}[split]).to(device))
        return {"loss": float(loss.detach())}

    def data_hash(self) -> str:
        return f"heat {self.batch_size}"


@hookimpl
def metaopt_problems() -> dict[str, type[Problem]]:
    return {"heat": Heat}
