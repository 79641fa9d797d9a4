"""The scheduler to hand to a client that insists on one: it reports the rates and sets none."""

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler


class ReadOnlyLRScheduler(LRScheduler):
    """An LRScheduler whose `step()` only reads the learning rates that the stack's own schedules wrote."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # torch's constructor would write learning rates and patch `step`: neither may happen here
        self.optimizer = optimizer
        self.base_lrs = [float(rate) for rate in self.get_lr()]
        self.last_epoch = 0
        self._step_count = 1
        self._read()

    def _read(self) -> None:
        self._last_lr = self.get_lr()

    def get_lr(self) -> list[Any]:
        """Return the current learning rate of every group; NaN if the base works it out itself (`lr=None`)."""
        rates = (group.get("lr") for group in self.optimizer.param_groups)
        return [math.nan if rate is None else rate for rate in rates]

    def step(self, epoch: int | None = None) -> None:
        """Note the current learning rates; change nothing."""
        self.last_epoch += 1
        self._step_count += 1
        self._read()

    def state_dict(self) -> dict[str, Any]:
        """Return the count of calls: everything else belongs to the optimizer's state dict."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the count back and read the rates again."""
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["_step_count"]
        self._read()
