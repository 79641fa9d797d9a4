"""A problem from what a training script has: a model, batches, a loss and metrics."""

import copy
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from metaopt.errors import ProblemError
from metaopt.lab.batches import mapped, tensors
from metaopt.lab.own import lightning
from metaopt.lab.own.passes import OwnRandomNumbers, Source
from metaopt.problem_class import Problem
from metaopt.tensor_problem import add_to_hash, evaluating

Measure = Callable[[nn.Module, Any], Any]

# batches of each split that the hash of the data reads
HASHED = 8


class GivenProblem(Problem):
    """What `metaopt.problem` returns: it trains a user's model on a user's batches."""

    # the module that made it, where other processes look for it
    made_in: str = ""

    def __init__(
        self,
        model: Any,
        sources: Callable[[], Mapping[str, Source]],
        loss: Measure | None,
        metrics: Mapping[str, Measure],
    ) -> None:
        super().__init__()
        self._model, self._make_sources, self._loss, self._metrics = model, sources, loss, metrics
        self._made_sources: Mapping[str, Source] | None = None
        self._hash: str | None = None

    def model(self, seed: int, device: torch.device | str = "cpu") -> nn.Module:
        with OwnRandomNumbers(seed):
            # a module is where every seed begins: a model that was trained before
            made = copy.deepcopy(self._model) if isinstance(self._model, nn.Module) else self._model()
            if not isinstance(made, nn.Module):
                raise ProblemError(f"model must be a module, or a function that returns one, got {made!r:.60}")
            lightning.prepare(made)
        return made.train().to(device)

    def batches(self, seed: int, device: torch.device | str = "cpu", start: int = 0) -> Iterator[Any]:
        for batch in self._sources()["train"].endless(seed, start):
            yield moved(batch, device)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        found = self._loss_of(model, batch)
        if not isinstance(found, torch.Tensor) or found.dim():
            raise ProblemError(f"loss must be one number, a tensor without dimensions, got {found!r:.60}")
        return found

    def evaluate(self, model: nn.Module, split: str = "validation") -> dict[str, float]:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        means = Means()
        with torch.no_grad(), evaluating(model), OwnRandomNumbers(0):
            steps = lightning.Steps(model) if self._loss is None and lightning.is_module(model) else None
            for batch in self._held_out(split):
                there = moved(batch, device)
                values = {"loss": self.loss(model, there)} if steps is None else steps.values(there)
                values |= {name: metric(model, there) for name, metric in self._metrics.items()}
                means.add(values, _examples(batch))
            found = means.all() | (steps.end() if steps is not None else {})
        if not means.weights:
            raise ProblemError(f"{split} must hold a batch or more, got none")
        missing = set(self.targets) - found.keys()
        if missing:
            raise ProblemError(f"targets must name one of {', '.join(found)}, got {', '.join(sorted(missing))}")
        return found

    def data_hash(self) -> str:
        """Return a hash of the first batches of each split, of initial weights and of the code of the functions."""
        if self._hash is None:
            found = hashlib.sha256(repr([_code(self._loss), *map(_code, self._metrics.values())]).encode())
            for name, tensor in self.model(0).state_dict().items():
                add_to_hash(found, name, tensor)
            for split in ("train", "validation", "test"):
                batches = self.batches(0) if split == "train" else self._held_out(split)
                for batch in itertools.islice(batches, HASHED):
                    for tensor in tensors(batch):
                        add_to_hash(found, split, tensor)
            self._hash = found.hexdigest()
        return self._hash

    def _sources(self) -> Mapping[str, Source]:
        if self._made_sources is None:
            with OwnRandomNumbers(0):
                self._made_sources = self._make_sources()
        return self._made_sources

    def _held_out(self, split: str) -> Iterator[Any]:
        sources = self._sources()
        if "test" in sources:
            return sources[split].once()
        # every second batch: what chose the settings is no test of them
        return itertools.islice(sources["validation"].once(), 0 if split == "validation" else 1, None, 2)

    def _loss_of(self, model: nn.Module, batch: Any) -> Any:
        if self._loss is not None:
            return self._loss(model, batch)
        if lightning.is_module(model):
            return lightning.training_loss(model, batch)
        found = getattr(model(**batch), "loss", None) if isinstance(batch, Mapping) else None
        if found is None:
            raise ProblemError(
                "loss is missing: give metaopt.problem(loss=...) a function of model and batch. Only a LightningModule "
                "and a model that returns a loss for a batch with labels have their own"
            )
        return found


class Means:
    """Means over batches of values by name, each batch weighted by its number of examples."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self.weights: dict[str, int] = {}

    def add(self, values: Mapping[str, Any], examples: int) -> None:
        """Count the values of one batch."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + examples * float(value)
            self.weights[name] = self.weights.get(name, 0) + examples

    def all(self) -> dict[str, float]:
        """Return the means."""
        return {name: total / self.weights[name] for name, total in self._sums.items()}


def moved(batch: Any, device: torch.device | str) -> Any:
    """Return a batch with its tensors on a device."""
    if not isinstance(batch, torch.Tensor | Mapping | tuple | list) and hasattr(batch, "to"):
        return batch.to(device)
    return mapped(batch, lambda tensor: tensor.to(device))


def _examples(batch: Any) -> int:
    return next((len(tensor) for tensor in tensors(batch) if tensor.dim()), 1)


def _code(function: Any) -> Any:
    """Return what changes with the code of a function, also of one that no file holds."""
    code = getattr(function, "__code__", None)
    if code is None:
        return repr(function) if isinstance(function, nn.Module) else getattr(function, "__qualname__", "")
    inner = [_code_of(constant) for constant in code.co_consts]
    return code.co_code.hex(), code.co_names, inner


def _code_of(constant: Any) -> Any:
    return (constant.co_code.hex(), constant.co_names) if hasattr(constant, "co_code") else repr(constant)
