"""A small classifier on data that need no download: XOR."""

import torch
from torch import nn

from metaopt import Problem, TensorProblem, hookimpl, hyper

Data = tuple[torch.Tensor, ...]


class XorNetwork(nn.Sequential):
    """The 2-16-16-1 network."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


class Xor(TensorProblem):
    """The sign of x y: 1000 points of the square, a 2-16-16-1 tanh network, batches of 32."""

    targets = {"accuracy": 0.98}
    batch_size: int = hyper(32, ge=1, doc="points in a batch")

    def rows(self, split: str) -> Data:
        seed = {"train": 0, "validation": 1, "test": 2}[split]
        x = torch.rand(1000, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        return x, (x[:, 0] * x[:, 1] > 0).float()

    def network(self) -> nn.Module:
        return XorNetwork()

    def loss(self, model: nn.Module, batch: Data) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(model(batch[0]).squeeze(-1), batch[1])

    def metrics(self, model: nn.Module, batch: Data) -> dict[str, torch.Tensor]:
        return {"accuracy": ((model(batch[0]).squeeze(-1) > 0) == (batch[1] > 0.5)).float().mean()}


@hookimpl
def metaopt_problems() -> dict[str, type[Problem]]:
    return {"xor": Xor}
