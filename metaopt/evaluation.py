"""One evaluation of the loss per `step()`, and more where the base asks for them (L-BFGS)."""

from typing import TYPE_CHECKING, Any

import torch

from metaopt.errors import StepError
from metaopt.wrapper import Closure

if TYPE_CHECKING:
    from metaopt.stack import Stack


class Evaluation:
    """The closure of one `step()`: evaluated once before the base, replayed to it, evaluated again on demand."""

    def __init__(self, stack: "Stack", closure: Closure | None) -> None:
        if closure is None and stack.needs_closure:
            raise StepError(f"{type(stack.base).__name__} evaluates the loss itself: call step(closure)")
        self.closure = closure
        self._stack = stack
        self._loss: Any = None
        self._versions: list[int] | None = None

    def first(self) -> Any:
        """Evaluate the loss (None without a closure); gradients are as the closure left them."""
        if self.closure is not None:
            self._loss = self._stack.evaluate_around(self._evaluate)
            self._versions = self._parameter_versions()
        return self._loss

    def replay(self) -> Any:
        """Give the base the first evaluation while the parameters are still the same, a new one afterwards."""
        if self._versions is not None and self._versions == self._parameter_versions():
            self._versions = None
            return self._loss
        self._versions = None
        loss = self._stack.evaluate_around(self._evaluate)
        self._stack.filter_gradients()
        self._stack.apply_scale()
        return loss

    def _evaluate(self) -> Any:
        assert self.closure is not None
        with torch.enable_grad():
            return self.closure()

    def _parameter_versions(self) -> list[int]:
        return [p._version for entry in self._stack.param_groups for p in entry["params"]]
