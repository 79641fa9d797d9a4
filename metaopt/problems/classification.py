"""Small classifiers on data that need no download: XOR and scikit-learn's handwritten digits."""

import hashlib
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import nn

from metaopt import MissingExtra, Problem, hookimpl, hyper

Data = tuple[torch.Tensor, torch.Tensor]


def initialised(seed: int, make: type[nn.Module], device: torch.device | str) -> nn.Module:
    """Return a model with the weights of one seed; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().to(device)


def batch_of(data: Data, seed: int, number: int, size: int) -> Data:
    """Return batch `number`: whole epochs, each shuffled anew, so a batch depends on seed and number alone."""
    per_epoch = max(1, len(data[0]) // size)
    epoch, position = divmod(number, per_epoch)
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(1_000_003 * (seed + 1) + epoch))
    chosen = order[position * size : (position + 1) * size]
    return data[0][chosen], data[1][chosen]


def hash_of(split: Callable[[str], Data]) -> str:
    """Return a hash of the inputs and targets of every split, in its order."""
    found = hashlib.sha256()
    for name in ("train", "validation", "test"):
        for tensor in split(name):
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


class XorNetwork(nn.Sequential):
    """The 2-16-16-1 network."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


class Xor(Problem):
    """The sign of x y: 1000 points of the square, a 2-16-16-1 tanh network, batches of 32."""

    targets = {"accuracy": 0.98}
    batch_size: int = hyper(32, ge=1, doc="points in a batch")

    def _points(self, split: str) -> Data:
        seed = {"train": 0, "validation": 1, "test": 2}[split]
        x = torch.rand(1000, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        return x, (x[:, 0] * x[:, 1] > 0).float()

    def model(self, seed: int, device: torch.device | str = "cpu") -> nn.Module:
        return initialised(seed, XorNetwork, device)

    def batches(self, seed: int, device: torch.device | str = "cpu", start: int = 0) -> Iterator[Data]:
        data, number = self._points("train"), start
        while True:
            x, y = batch_of(data, seed, number, self.batch_size)
            yield x.to(device), y.to(device)
            number += 1

    def loss(self, model: nn.Module, batch: Data) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(model(batch[0]).squeeze(-1), batch[1])

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str = "validation") -> dict[str, float]:
        device = next(model.parameters()).device
        x, y = (tensor.to(device) for tensor in self._points(split))
        logits = model(x).squeeze(-1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, y)
        return {"loss": float(loss), "accuracy": float(((logits > 0) == (y > 0.5)).float().mean())}

    def data_hash(self) -> str:
        return hash_of(self._points)


class DigitsNetwork(nn.Sequential):
    """Two convolutions and a linear layer: 8x8 pixels in, ten classes out."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 4 * 4, 10),
        )


@cache
def shuffled_digits() -> Data:
    """Return all images and their classes in one fixed order. Raises MissingExtra without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtra("the problem digits", "scikit-learn", "lab") from None
    loaded = load_digits()
    x = torch.tensor(loaded.images, dtype=torch.float32)[:, None] / 16.0
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], torch.tensor(loaded.target)[order]


class Digits(Problem):
    """1797 real handwritten digits of 8x8 pixels (scikit-learn's): 1000 to train, 397 to validate, 400 to test."""

    targets = {"accuracy": 0.95}
    default_steps = 100
    batch_size: int = hyper(64, ge=1, doc="images in a batch")

    def _split(self, split: str) -> Data:
        x, y = shuffled_digits()
        chosen = {"train": slice(0, 1000), "validation": slice(1000, 1397), "test": slice(1397, None)}[split]
        return x[chosen], y[chosen]

    def model(self, seed: int, device: torch.device | str = "cpu") -> nn.Module:
        return initialised(seed, DigitsNetwork, device)

    def batches(self, seed: int, device: torch.device | str = "cpu", start: int = 0) -> Iterator[Data]:
        data, number = self._split("train"), start
        while True:
            x, y = batch_of(data, seed, number, self.batch_size)
            yield x.to(device), y.to(device)
            number += 1

    def loss(self, model: nn.Module, batch: Data) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str = "validation") -> dict[str, float]:
        device = next(model.parameters()).device
        x, y = (tensor.to(device) for tensor in self._split(split))
        logits = model(x)
        accuracy = (logits.argmax(-1) == y).float().mean()
        return {"loss": float(nn.functional.cross_entropy(logits, y)), "accuracy": float(accuracy)}

    def data_hash(self) -> str:
        return hash_of(self._split)


@hookimpl
def metaopt_problems() -> dict[str, type[Problem]]:
    return {"xor": Xor, "digits": Digits}
