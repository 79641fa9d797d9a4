"""Addition modulo a prime, the task on which networks were seen to generalise long after they had memorised."""

import torch
from torch import nn

from metaopt import Problem, TensorProblem, hookimpl, hyper

Data = tuple[torch.Tensor, ...]


class Adder(nn.Module):
    """An embedding for each summand, their sum, and two layers."""

    def __init__(self, prime: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(prime, width)
        self.hidden = nn.Linear(width, 4 * width)
        self.head = nn.Linear(4 * width, prime)

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.hidden(self.embedding(pairs).sum(1)).relu())
        return logits


class ModularAddition(TensorProblem):
    """a + b modulo a prime from 80% of all pairs; 10% to validate and 10% to test. arXiv:2201.02177"""

    targets = {"accuracy": 0.82}
    default_steps = 600
    prime: int = hyper(59, ge=5, doc="the modulus")
    width: int = hyper(32, ge=1, doc="width of the embedding")

    def rows(self, split: str) -> Data:
        every = torch.cartesian_prod(torch.arange(self.prime), torch.arange(self.prime))
        every = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]
        tenth = len(every) // 10
        pairs = {"validation": every[:tenth], "test": every[tenth : 2 * tenth], "train": every[2 * tenth :]}[split]
        return pairs, pairs.sum(1) % self.prime

    def network(self) -> nn.Module:
        return Adder(self.prime, self.width)

    def loss(self, model: nn.Module, batch: Data) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def metrics(self, model: nn.Module, batch: Data) -> dict[str, torch.Tensor]:
        return {"accuracy": (model(batch[0]).argmax(-1) == batch[1]).float().mean()}


@hookimpl
def metaopt_problems() -> dict[str, type[Problem]]:
    return {"modular_addition": ModularAddition}
