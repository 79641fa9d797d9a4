"""A recurrent network that has to remember: one symbol at the beginning of a sequence of noise."""

import torch
from torch import nn

from metaopt import Problem, TensorProblem, hookimpl, hyper

Data = tuple[torch.Tensor, ...]
SYMBOLS, NOISE = 6, 2


class Recurrent(nn.Module):
    """Embeddings, a GRU, and a linear layer on its last state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS + NOISE, width)
        self.memory = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, SYMBOLS)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        _, last = self.memory(self.embedding(text))
        logits: torch.Tensor = self.head(last[-1])
        return logits


class Recall(TensorProblem):
    """The first symbol of a sequence, named after noise: a GRU learns what to keep. doi:10.1162/neco.1997.9.8.1735"""

    targets = {"accuracy": 0.99}
    default_steps = 200
    batch_size: int = hyper(64, ge=1, doc="sequences in a batch")
    delay: int = hyper(16, ge=1, doc="symbols of noise")
    width: int = hyper(32, ge=1, doc="width of the network")

    def rows(self, split: str) -> Data:
        generator = torch.Generator().manual_seed({"train": 0, "validation": 1, "test": 2}[split])
        count = 2000 if split == "train" else 500
        first = torch.randint(SYMBOLS, (count,), generator=generator)
        noise = SYMBOLS + torch.randint(NOISE, (count, self.delay), generator=generator)
        return torch.cat([first[:, None], noise], 1), first

    def network(self) -> nn.Module:
        return Recurrent(self.width)

    def loss(self, model: nn.Module, batch: Data) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def metrics(self, model: nn.Module, batch: Data) -> dict[str, torch.Tensor]:
        return {"accuracy": (model(batch[0]).argmax(-1) == batch[1]).float().mean()}


@hookimpl
def metaopt_problems() -> dict[str, type[Problem]]:
    return {"recall": Recall}
