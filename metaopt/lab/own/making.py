"""`metaopt.problem(...)`: a problem of one's own in one call, without a class."""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from metaopt.errors import ProblemError
from metaopt.lab.own import lightning
from metaopt.lab.own.passes import Source
from metaopt.lab.own.problem import GivenProblem, Measure
from metaopt.problem_class import Problem


def problem(
    *,
    model: Any,
    batches: Any,
    validation: Any = None,
    test: Any = None,
    loss: Any = None,
    metrics: Mapping[str, Callable[[Any, Any], Any]] | None = None,
    targets: Mapping[str, float] | None = None,
    steps: int = 500,
    batch_size: int | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    name: str = "problem",
) -> Problem:
    """Return a problem made of what a training script has, to train, tune and compare on.

    Write it at the top level of a module, `digits = metaopt.problem(...)` in `mine.py`, and name it
    `--problem mine:digits`, or give the object to `metaopt.lab.train`, `tune` and `compare`. Random numbers are taken
    care of: a batch depends on the seed and its number, also with shuffling, augmentation and workers.

    Args:
        model: A function or class without arguments that returns a module; called anew for each seed. A module itself
            is where every seed begins, such as a model that was trained before.
        batches: A `DataLoader`, a list of batches, or a function that returns one; or a `LightningDataModule`.
        validation: Batches that settings are chosen by. Needed unless `batches` is a `LightningDataModule`.
        test: Batches that verdicts are about. Without it, every second batch of `validation` is kept for them.
        loss: A function of model and batch; or a loss of torch, for batches `(inputs, targets)`. A `LightningModule`
            and a model of Hugging Face have their own.
        metrics: Functions of model and batch by name, averaged over the examples; larger is better.
        targets: The metric and the value that a run has to reach, such as `{"accuracy": 0.95}`.
        steps: How many gradients a run evaluates if no other number is given.
        batch_size: Given, `batches`, `validation` and `test` are data sets of examples, not of batches.
        collate: How such examples become a batch; torch's way by default.
        name: What messages call it.

    Raises:
        ProblemError: Something here cannot be used as it was given.
    """
    measures = dict(metrics or {})
    _check(model, loss, measures, steps, batch_size)
    given = {"train": batches, "validation": validation, "test": test}
    if validation is None:
        if not (callable(batches) or lightning.is_data(batches)):
            raise ProblemError(lightning.MISSING)
        sources = partial(lightning.sources, batches)
    else:
        sources = partial(_sources, given, batch_size, collate)
    kind = type(name, (GivenProblem,), {"targets": dict(targets or {}), "default_steps": steps})
    made: GivenProblem = kind(model, sources, _loss(loss), measures)
    made.made_in = sys._getframe(1).f_globals.get("__name__", "")
    return made


def _sources(given: Mapping[str, Any], batch_size: int | None, collate: Any) -> dict[str, Source]:
    return {
        split: Source(_loader(data, split, batch_size, collate), _named(split))
        for split, data in given.items()
        if data is not None
    }


def _check(model: Any, loss: Any, metrics: Mapping[str, Any], steps: int, batch_size: int | None) -> None:
    if not callable(model):
        raise ProblemError(f"model must be a function that returns a module, or a module, got {model!r:.60}")
    if loss is not None and not callable(loss):
        raise ProblemError(f"loss must be a function of model and batch, or a loss of torch, got {loss!r:.60}")
    for name, metric in metrics.items():
        if not callable(metric) or name == "loss":
            raise ProblemError(
                f"metrics must be functions by name, none of them called loss, got {name}: {metric!r:.60}"
            )
    if steps < 1 or (batch_size is not None and batch_size < 1):
        raise ProblemError(f"steps and batch_size must be 1 or more, got {steps} and {batch_size}")


def _named(split: str) -> str:
    return "batches" if split == "train" else split


def _loader(data: Any, split: str, batch_size: int | None, collate: Any) -> Any:
    """Return batches: a data set of examples as a loader."""
    if batch_size is None:
        if isinstance(data, Dataset):
            raise ProblemError(f"{_named(split)} is a data set of examples: give batch_size as well, or a DataLoader")
        return data
    if isinstance(data, DataLoader):
        raise ProblemError(f"{_named(split)} is a DataLoader, which has a batch size: leave batch_size out")
    shuffled = split == "train" and not isinstance(data, IterableDataset)
    # the last batch of a pass is left out in training: it is a smaller one
    whole = split == "train" and (not hasattr(data, "__len__") or len(data) >= batch_size)
    return DataLoader(data, batch_size, shuffle=shuffled, drop_last=whole, collate_fn=collate or _collated)


def _collated(examples: list[Any]) -> Any:
    """Return a batch of examples; dicts as the models of Hugging Face take them, where their library is in use."""
    transformers = sys.modules.get("transformers")
    if isinstance(examples[0], Mapping) and transformers is not None:
        return transformers.default_data_collator(examples)
    return default_collate(examples)


def _loss(given: Any) -> Measure | None:
    """Return the loss as a function of model and batch; one of torch takes outputs and targets."""
    if not isinstance(given, nn.Module) and not str(getattr(given, "__module__", "")).startswith("torch."):
        return given  # type: ignore[no-any-return]

    def loss(model: Any, batch: Any) -> Any:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ProblemError(
                f"{_called(given)} takes batches of (inputs, targets), got {type(batch).__name__}: {batch!r:.60}"
            )
        return given(model(batch[0]), batch[1])

    return loss


def _called(given: Any) -> str:
    return given.__name__ if hasattr(given, "__name__") else type(given).__name__
