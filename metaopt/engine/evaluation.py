"""One evaluation of the loss per `step()`, and more where the base asks for them (L-BFGS)."""

from typing import TYPE_CHECKING, Any

import torch

from metaopt.engine.gradients import AllGradients, filter_gradients
from metaopt.engine.scaling import apply_scales
from metaopt.errors import StepError
from metaopt.wrapper import Closure

if TYPE_CHECKING:
    from metaopt.stack import Stack


class Evaluation:
    """The closure of one `step()`: evaluated once before the base, replayed to it, evaluated again on demand."""

    def __init__(self, stack: "Stack", closure: Closure | None) -> None:
        if closure is None and stack.needs_closure:
            raise StepError(f"{type(stack.base).__name__} evaluates the loss itself: call step(closure)")
        if closure is None and stack.phases.around:
            raise StepError(
                f"{stack.phases.around[0].label} evaluates the loss itself: call step(closure), "
                f"with a closure that clears the gradients, computes the loss, calls backward() and returns the loss; "
                f"GradScaler.step() cannot hand one over: train in bfloat16, without it"
            )
        self.closure = closure
        self._stack = stack
        self._loss: Any = None
        self._versions: list[int] | None = None

    def first(self) -> Any:
        """Evaluate the loss (None without a closure); gradients are as the closure left them."""
        if self.closure is not None:
            self._loss = self._around_each(self._evaluate)()
            if self._stack.needs_closure:
                self._versions = self._parameter_versions()
        return self._loss

    def for_base(self) -> tuple[Closure, ...]:
        """Return what the base's step is called with: several bases share the one evaluation."""
        return () if self.closure is None or len(self._stack.lanes) > 1 else (self.replay,)

    def replay(self) -> Any:
        """Give the base the first evaluation, and a new one where it has moved the parameters or asks again."""
        if self._stack.needs_closure:
            versions, self._versions = self._versions, None
            if versions is None or versions != self._parameter_versions():
                return self._again()
        elif self._loss is None:
            return self._again()
        loss, self._loss = self._loss, None
        return loss

    def _again(self) -> Any:
        loss = self._evaluate()
        filter_gradients(self._stack)
        apply_scales(self._stack)
        return loss

    def _around_each(self, closure: Closure) -> Closure:
        """Put the wrappers that own the evaluation around it, the first one outermost."""
        for wrapper in reversed(self._stack.phases.around):
            closure = _surrounded(wrapper, closure, AllGradients(self._stack, wrapper, None))
        return closure

    def _evaluate(self) -> Any:
        assert self.closure is not None
        with torch.enable_grad():
            return self.closure()

    def _parameter_versions(self) -> list[int]:
        return [p._version for entry in self._stack.param_groups for p in entry["params"]]


def _surrounded(wrapper: Any, closure: Closure, groups: AllGradients) -> Closure:
    return lambda: wrapper.around(closure, groups)
