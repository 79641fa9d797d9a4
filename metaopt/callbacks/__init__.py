"""Callbacks for trainers that evaluate, keep the best and export by an average: one file for each library."""

from collections.abc import Iterable
from contextlib import ExitStack

import torch

from metaopt.errors import StepError
from metaopt.stack import Stack


def stacks_with_average(optimizers: Iterable[object], label: str | None) -> list[Stack]:
    """Return the stacks among a client's optimizers, out of their shells. Raises StepError if none keeps an average."""
    found = []
    for optimizer in optimizers:
        while not isinstance(optimizer, Stack) and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        if isinstance(optimizer, Stack) and optimizer.averages and label in (None, *optimizer.averages):
            found.append(optimizer)
    if not found:
        called = "an average" if label is None else f"an average called {label!r}"
        raise StepError(
            f"EvaluateAverage: no optimizer of the trainer is a stack that keeps {called}: build one, such as "
            f"metaopt.build(model, 'adamw | ema')"
        )
    return found


class Shown:
    """Averages that are in a model now, until `leave`."""

    def __init__(self, stacks: Iterable[Stack], label: str | None, model: torch.nn.Module) -> None:
        self._stacks = list(stacks)
        self._open = ExitStack()
        for stack in self._stacks:
            self._open.enter_context(stack.averaged(label, model=model))

    def leave(self) -> None:
        """Give the model its weights and buffers back."""
        self._open.close()

    @torch.no_grad()
    def leave_and_keep(self) -> None:
        """Give the stacks up to now their weights back, and leave in the model what it holds."""
        params = [p for stack in self._stacks for group in stack.param_groups for p in group["params"]]
        held = [p.detach().clone() for p in params]
        self.leave()
        for p, value in zip(params, held, strict=True):
            p.copy_(value)
