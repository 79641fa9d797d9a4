"""A matrix from some of its entries: most rows of the gradient are zero, as in a recommender."""

import torch
from torch import nn

from metaopt import Problem, TensorProblem, hookimpl, hyper

Data = tuple[torch.Tensor, ...]
ROWS, COLUMNS, RANK, NOISE = 200, 150, 4, 0.1


class Factors(nn.Module):
    """A vector for each row and for each column; an entry is their product and a mean of all."""

    def __init__(self, rank: int, sparse: bool) -> None:
        super().__init__()
        self.rows = nn.Embedding(ROWS, rank, sparse=sparse)
        self.columns = nn.Embedding(COLUMNS, rank, sparse=sparse)
        self.mean = nn.Parameter(torch.zeros(1))
        for factor in (self.rows, self.columns):
            nn.init.normal_(factor.weight, std=0.3)

    def forward(self, places: torch.Tensor) -> torch.Tensor:
        products: torch.Tensor = self.rows(places[:, 0]) * self.columns(places[:, 1])
        return products.sum(1) + self.mean


class Factorisation(TensorProblem):
    """A noisy 200 x 150 matrix of rank 4 from a fifth of its entries, by squared error. doi:10.1109/MC.2009.263"""

    targets = {"loss": 0.052}
    default_steps = 300
    batch_size: int = hyper(128, ge=1, doc="entries in a batch")
    rank: int = hyper(6, ge=1, doc="length of the vectors")
    sparse: bool = hyper(False, doc="sparse gradients, for bases that take them: sgd, sparse_adam")

    def rows(self, split: str) -> Data:
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.randn(size, RANK, generator=generator) for size in (ROWS, COLUMNS))
        matrix = left @ right.T / RANK**0.5 + NOISE * torch.randn(ROWS, COLUMNS, generator=generator)
        order = torch.randperm(ROWS * COLUMNS, generator=generator)
        chosen = order[{"train": slice(0, 6000), "validation": slice(6000, 8000), "test": slice(8000, 10000)}[split]]
        places = torch.stack([chosen // COLUMNS, chosen % COLUMNS], 1)
        return places, matrix.flatten()[chosen]

    def network(self) -> nn.Module:
        return Factors(self.rank, self.sparse)

    def loss(self, model: nn.Module, batch: Data) -> torch.Tensor:
        errors: torch.Tensor = model(batch[0]) - batch[1]
        return errors.square().mean()


@hookimpl
def metaopt_problems() -> dict[str, type[Problem]]:
    return {"factorisation": Factorisation}
