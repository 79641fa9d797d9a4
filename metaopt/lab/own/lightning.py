"""A LightningModule and its LightningDataModule as a problem; lightning itself is never imported from here."""

import inspect
import itertools
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from metaopt.errors import ProblemError
from metaopt.lab.own.passes import Source

# the same classes under the names of both packages
PACKAGES = ("lightning.pytorch", "pytorch_lightning")
MISSING = (
    "validation is missing: give metaopt.problem(validation=...) batches that are not trained on, to choose settings "
    "by. Only a LightningDataModule brings its own"
)
PREFIX = re.compile(r"^(val|valid|validation|eval|test)[_/]")


def _classes(name: str) -> tuple[Any, ...]:
    return tuple(getattr(sys.modules[package], name) for package in PACKAGES if package in sys.modules)


def is_module(value: Any) -> bool:
    """Return whether a value is a LightningModule."""
    return isinstance(value, _classes("LightningModule"))


def is_data(value: Any) -> bool:
    """Return whether a value is a LightningDataModule."""
    return isinstance(value, _classes("LightningDataModule"))


def sources(data: Any) -> dict[str, Source]:
    """Return the loaders of a LightningDataModule, or of one that a function returns, by split.

    There is no test if it has no test loader. Raises ProblemError.
    """
    made = data if is_data(data) else data()
    if not is_data(made):
        raise ProblemError(MISSING)
    made.prepare_data()
    made.setup("fit")
    found = {"train": _joined(made.train_dataloader(), "train_dataloader()")}
    found["validation"] = _joined(made.val_dataloader(), "val_dataloader()")
    if not any(type(made).test_dataloader is kind.test_dataloader for kind in _classes("LightningDataModule")):
        made.setup("test")
        found["test"] = _joined(made.test_dataloader(), "test_dataloader()")
    return found


def _joined(loaders: Any, what: str) -> Source:
    """Return one loader as it is, and several as one after the other."""
    if isinstance(loaders, list | tuple):
        return Source(lambda: itertools.chain.from_iterable(loaders), what)
    return Source(loaders, what)


def prepare(model: nn.Module) -> None:
    """Let a LightningModule train without a Trainer: what it logs goes nowhere. Raises ProblemError."""
    if not is_module(model):
        return
    lightning: Any = model
    if not lightning.automatic_optimization:
        raise ProblemError(
            f"{type(model).__name__} steps its optimizers itself (automatic_optimization=False): it must return the "
            "loss from training_step instead"
        )
    lightning.setup("fit")
    lightning.configure_model()
    lightning.log = lightning.log_dict = _ignored


def _ignored(*arguments: Any, **options: Any) -> None:
    pass


def training_loss(model: Any, batch: Any) -> Any:
    """Return the loss of `training_step`."""
    return _loss_in(_call(model.training_step, batch, 0), f"training_step of {type(model).__name__}")


def _call(step: Any, batch: Any, number: int) -> Any:
    return step(batch, number) if len(inspect.signature(step).parameters) > 1 else step(batch)


def _loss_in(returned: Any, what: str) -> Any:
    found = returned.get("loss") if isinstance(returned, Mapping) else returned
    if found is None:
        raise ProblemError(f"{what} must return the loss, or a dict with it, got {returned!r:.60}")
    return found


class Steps:
    """The validation steps of a LightningModule: what it returns and logs, by name without `val_` in front."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._number = -1
        self._logged: dict[str, Any] = {}
        # metrics of torchmetrics gather over batches themselves
        self._gathering: dict[str, Any] = {}
        self._during(model.on_validation_epoch_start)

    def values(self, batch: Any) -> dict[str, Any]:
        """Return the loss of a batch and what was logged for it."""
        self._number += 1
        returned = self._during(lambda: _call(self._model.validation_step, batch, self._number))
        logged = dict(self._logged)
        if isinstance(returned, torch.Tensor | Mapping) and not (
            isinstance(returned, Mapping) and "loss" not in returned
        ):
            logged["loss"] = _loss_in(returned, "validation_step")
        elif "loss" not in logged:
            logged["loss"] = training_loss(self._model, batch)
        return logged

    def end(self) -> dict[str, float]:
        """Return what is known only after the last batch."""
        self._during(self._model.on_validation_epoch_end)
        found = {name: float(value) for name, value in self._logged.items()}
        for name, metric in self._gathering.items():
            found[name] = float(metric.compute())
        for metric in self._gathering.values():
            metric.reset()
        return found

    def _during(self, call: Any) -> Any:
        self._logged = {}
        self._model.log, self._model.log_dict = self._log, self._log_all
        try:
            return call()
        finally:
            self._model.log = self._model.log_dict = _ignored

    def _log(self, name: str, value: Any, *arguments: Any, **options: Any) -> None:
        kept = self._gathering if hasattr(value, "compute") else self._logged
        kept[PREFIX.sub("", name)] = value

    def _log_all(self, values: Mapping[str, Any], *arguments: Any, **options: Any) -> None:
        for name, value in values.items():
            self._log(name, value)
