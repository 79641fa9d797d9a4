"""scikit-learn's handwritten digits with four networks: convolutions, with BatchNorm, a transformer, an autoencoder."""

import itertools
from functools import cache

import torch
from torch import nn

from metaopt import MissingExtra, Problem, TensorProblem, hookimpl, hyper

Data = tuple[torch.Tensor, ...]
SPLITS = {"train": slice(0, 1000), "validation": slice(1000, 1397), "test": slice(1397, None)}


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


class Digits(TensorProblem):
    """1797 real handwritten digits of 8x8 pixels (scikit-learn's): 1000 to train, 397 to validate, 400 to test."""

    targets = {"accuracy": 0.95}
    default_steps = 100
    batch_size: int = hyper(64, ge=1, doc="images in a batch")

    def rows(self, split: str) -> Data:
        x, y = shuffled_digits()
        return x[SPLITS[split]], y[SPLITS[split]]

    def network(self) -> nn.Module:
        return DigitsNetwork()

    def loss(self, model: nn.Module, batch: Data) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def metrics(self, model: nn.Module, batch: Data) -> dict[str, torch.Tensor]:
        return {"accuracy": (model(batch[0]).argmax(-1) == batch[1]).float().mean()}


class DigitsBatchNorm(Digits):
    """The digits with four convolutions, BatchNorm behind each, and a residual connection. arXiv:1502.03167"""

    def network(self) -> nn.Module:
        return BatchNormNetwork()


class BatchNormNetwork(nn.Module):
    """A convolution, a residual block of two, a convolution, mean over pixels, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = _convolution(1, 12)
        self.block = nn.Sequential(_convolution(12, 12), nn.ReLU(), _convolution(12, 12))
        self.last = nn.Sequential(nn.MaxPool2d(2), _convolution(12, 24), nn.ReLU())
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).relu()
        hidden = self.last((hidden + self.block(hidden)).relu())
        logits: torch.Tensor = self.head(hidden.mean((2, 3)))
        return logits


def _convolution(channels: int, to: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, to, 3, padding=1, bias=False), nn.BatchNorm2d(to))


class DigitsViT(Digits):
    """The digits with a vision transformer: 16 patches of 2x2 pixels, two pre-norm blocks. arXiv:2010.11929"""

    targets = {"accuracy": 0.87}
    default_steps = 200
    width: int = hyper(32, ge=4, doc="width of the transformer; a multiple of 4")

    def network(self) -> nn.Module:
        return VisionTransformer(self.width)


class VisionTransformer(nn.Module):
    """Patches, positions, blocks, and a linear layer on the mean of all places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.patches(x).flatten(2).mT + self.positions
        logits: torch.Tensor = self.head(self.norm(self.blocks(hidden)).mean(1))
        return logits


class DigitsAutoencoder(Digits):
    """The digits through a bottleneck of 8 numbers: a deep tanh autoencoder, squared error times 64."""

    targets = {"loss": 1.8}
    default_steps = 200

    def network(self) -> nn.Module:
        widths = (64, 48, 24, 8, 24, 48, 64)
        layers: list[nn.Module] = [nn.Flatten()]
        for width, to in itertools.pairwise(widths):
            layers += [nn.Linear(width, to), nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    def loss(self, model: nn.Module, batch: Data) -> torch.Tensor:
        errors: torch.Tensor = model(batch[0]) - batch[0].flatten(1)
        return errors.square().sum(1).mean()

    def metrics(self, model: nn.Module, batch: Data) -> dict[str, torch.Tensor]:
        return {}


@hookimpl
def metaopt_problems() -> dict[str, type[Problem]]:
    return {
        "digits": Digits,
        "digits_autoencoder": DigitsAutoencoder,
        "digits_batch_norm": DigitsBatchNorm,
        "digits_vit": DigitsViT,
    }
