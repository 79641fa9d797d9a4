"""TensorProblem: a problem whose data are tensors with a row for each example."""

import hashlib
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from metaopt.hyperparameters import hyper
from metaopt.problem_class import Problem

Data = tuple[torch.Tensor, ...]


class TensorProblem(Problem):
    """What is trained on rows of tensors: subclasses give the rows of each split, the network and the loss.

    Batches are whole passes, each shuffled anew by the seed. Evaluation takes all rows at once, in evaluation mode.
    """

    batch_size: int = hyper(64, ge=1, doc="rows in a batch")

    @abstractmethod
    def rows(self, split: str) -> Data:
        """Return the tensors of "train", "validation" or "test", each with a row for each example."""

    @abstractmethod
    def network(self) -> nn.Module:
        """Return a new model; its weights may be drawn from torch's global generator."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Data) -> torch.Tensor:
        """Return the loss of some rows (0-dim, with a graph)."""

    def metrics(self, model: nn.Module, batch: Data) -> dict[str, torch.Tensor]:
        """Return further numbers on some rows, such as the accuracy."""
        return {}

    def model(self, seed: int, device: torch.device | str = "cpu") -> nn.Module:
        """Return the network with the weights of a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.network().to(device)

    def batches(self, seed: int, device: torch.device | str = "cpu", start: int = 0) -> Iterator[Data]:
        """Yield batches without end, pass after pass; the last rows of a pass that fill no batch are left out."""
        data, number = self.rows("train"), start
        count = len(data[0])
        per_pass = max(1, count // self.batch_size)
        while True:
            done, position = divmod(number, per_pass)
            generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + done)
            chosen = torch.randperm(count, generator=generator)[position * self.batch_size :][: self.batch_size]
            yield tuple(tensor[chosen].to(device) for tensor in data)
            number += 1

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str = "validation") -> dict[str, float]:
        """Return the loss and the metrics on all rows of a split."""
        device = next(model.parameters()).device
        batch = tuple(tensor.to(device) for tensor in self.rows(split))
        with evaluating(model):
            found: dict[str, Any] = {"loss": self.loss(model, batch), **self.metrics(model, batch)}
            return {name: float(value) for name, value in found.items()}

    def data_hash(self) -> str:
        """Return a hash of every tensor of every split."""
        found = hashlib.sha256()
        for split in ("train", "validation", "test"):
            for tensor in self.rows(split):
                add_to_hash(found, split, tensor)
        return found.hexdigest()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; each of its modules is in its own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def add_to_hash(found: Any, name: str, tensor: torch.Tensor) -> None:
    """Add a tensor of any dtype and device to a hash: its name, shape, dtype and bits."""
    plain = tensor.detach().cpu().contiguous()
    found.update(f"{name} {tuple(plain.shape)} {plain.dtype}".encode())
    found.update(plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
