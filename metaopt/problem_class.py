"""Problem: a model, its data, its loss and its evaluation; what a comparison trains."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from metaopt.errors import ProblemError
from metaopt.hyperparameters import Hyperparameter, bind, declared

Batch = Any


class Problem(ABC):
    """What is trained: initial weights, batches, loss and evaluation, each a pure function of its seed.

    `targets` are fixed here, beforehand: a metric and the value that a run has to reach.
    """

    hyperparameters: ClassVar[dict[str, Hyperparameter]] = {}
    targets: ClassVar[dict[str, float]] = {}
    default_steps: ClassVar[int] = 500
    given: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.hyperparameters = declared(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        where = type(self).__name__.lower()
        self.given = bind(self.hyperparameters, where, args, kwargs)
        for name, hyperparameter in self.hyperparameters.items():
            if name not in self.given and hyperparameter.required:
                raise ProblemError(f"{where} needs {name}: {hyperparameter.doc}")
            setattr(self, name, hyperparameter.validate(self.given.get(name, hyperparameter.default), where=where))

    @abstractmethod
    def model(self, seed: int, device: torch.device | str = "cpu") -> torch.nn.Module:
        """Return a model with the initial weights of this seed; the global generators are left as they were."""

    @abstractmethod
    def batches(self, seed: int, device: torch.device | str = "cpu", start: int = 0) -> Iterator[Batch]:
        """Yield batches without end, from number `start` on: each depends on the seed and its number alone."""

    @abstractmethod
    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return the loss of one batch (0-dim, with a graph)."""

    @abstractmethod
    def evaluate(self, model: torch.nn.Module, split: str = "validation") -> dict[str, float]:
        """Return `loss`, and `accuracy` where it applies, on "validation" or "test" data."""

    @abstractmethod
    def data_hash(self) -> str:
        """Return a hash of the data and of how they are split."""
