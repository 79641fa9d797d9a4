"""The closure of one `step()`: the base gets the loss of one evaluation, and a new one if it asks again (L-BFGS).

It changes gradients, through the closure and the wrappers around it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from metaopt.engine.step.hooks import call_on_gradients
from metaopt.engine.update.update import Update
from metaopt.errors import StepError
from metaopt.wrapper import Closure, Wrapper


class Evaluation:
    """The closure of one `step()`, evaluated before the base, which then gets its loss.

    Wrappers may evaluate it more often (SAM); so may the base (L-BFGS). `update` is None if no update is due.
    """

    def __init__(self, update: Update, closure: Closure | None) -> None:
        self.run = update.run
        self.update: Update | None = update
        self.loss: Any = None
        self._closure = closure
        self._handed_over = True
        self._versions: list[int] | None = None

    def evaluate(self, around: Callable[[Wrapper, Closure], Any]) -> None:
        """Evaluate the loss (None without a closure); `around` calls a wrapper that owns the evaluation."""
        structure = self.run.structure
        if self._closure is None and structure.needs_closure:
            raise StepError(f"{type(self.run.base).__name__} evaluates the loss itself: call step(closure)")
        if self._closure is None and structure.around:
            raise StepError(
                f"{structure.around[0].label} evaluates the loss itself: call step(closure), "
                f"with a closure that clears the gradients, computes the loss, calls backward() and returns the loss; "
                f"GradScaler.step() cannot hand one over: train in bfloat16, without it"
            )
        if self._closure is None:
            return
        evaluate: Closure = self.call_closure
        for wrapper in reversed(structure.around):  # the first one outermost
            evaluate = partial(around, wrapper, evaluate)
        self.loss = evaluate()
        self._handed_over = False
        if structure.needs_closure:
            self._versions = self._parameter_versions()

    def closure_for_base(self) -> tuple[Closure, ...]:
        """Return what the base's step is called with; several bases share the one evaluation."""
        return () if self._closure is None or len(self.run.structure.chains) > 1 else (self.replay,)

    def replay(self) -> Any:
        """Give the base the first evaluation, and a new one if it has moved the parameters or asks again."""
        if self.run.structure.needs_closure:
            versions, self._versions = self._versions, None
            if versions is None or versions != self._parameter_versions():
                return self._reevaluate()
        elif self._handed_over:
            return self._reevaluate()
        self._handed_over = True
        return self.loss

    def _reevaluate(self) -> Any:
        assert self.update is not None
        loss = self.call_closure()
        call_on_gradients(self.update)
        for chain in list(self.update.pending_scale):
            self.update.apply_scale(chain)
        return loss

    def call_closure(self) -> Any:
        """Call the closure with gradients enabled."""
        assert self._closure is not None
        try:
            with torch.enable_grad():
                return self._closure()
        finally:
            if self.update is not None:
                self.update.gradients_changed()

    def _parameter_versions(self) -> list[int]:
        return [p._version for group in self.run.param_groups for p in group["params"]]
