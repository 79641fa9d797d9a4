"""`torch.compile(opt.step)`: torch traces only the base's step, as it compiles it; everything around runs eagerly.

torch's tracer knows optimizers: it runs a base's `_init_group` for real and guards on its groups and state. It knows no
wrappers: traced, they would guard on every gradient tensor, which `zero_grad` frees, and specialise on which of the k
updates of a cycle this is. They are a few multi-tensor calls that a compiler could not make faster.
"""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from metaopt.engine.chain import ParamGroup
from metaopt.engine.run.run import Run
from metaopt.engine.step.base_step import turn_off_kernel_for_gradients, turn_off_kernel_for_late_momentum
from metaopt.engine.step.evaluation import Evaluation
from metaopt.engine.step.hooks import call_on_update_of_chain, keep_weights_for_on_update
from metaopt.engine.step.order import abandon, begin, finish
from metaopt.engine.update.update import Update
from metaopt.wrapper import Closure

Function = TypeVar("Function", bound=Callable[..., Any])


class CompiledStep:
    """What `Stack.step` does while torch traces it.

    A rate that changes is a retrace per value if a base passes it on as a number (SGD, or any multi-tensor path), so
    torch's own bases get theirs as a tensor while they are traced. What makes the base's state tensors anew, such as a
    Lookahead that resets the momentum, costs a retrace each time: after eight, torch runs that base eagerly.
    """

    def __init__(self) -> None:
        # made once per stack: the tracer guards on the identity of what it must not enter; by a weak reference, so that
        # a stack that is let go is freed without the cycle collector
        self._begin, self._finish, self._abandon, self._replay = (
            _untraced(_of_weak(weakref.WeakMethod(method)))
            for method in (self.begin, self.finish, self.abandon, self.replay)
        )
        self._evaluation: Evaluation | None = None
        self._rates: dict[int, torch.Tensor] = {}
        self._replaced: list[tuple[ParamGroup, ParamGroup]] = []

    @torch.no_grad()
    def __call__(self, run: Run, closure: Closure | None, keywords: dict[str, Any]) -> Any:
        loss, due, evaluates = self._begin(run, closure)
        if not due:
            return loss
        try:
            for chain in run.structure.chains:
                if evaluates:
                    chain.traced_step(self._replay, **keywords)
                else:
                    chain.traced_step(**keywords)
        except BaseException:
            self._abandon()
            raise
        self._finish()
        return loss

    def begin(self, run: Run, closure: Closure | None) -> tuple[Any, bool, bool]:
        """Do what comes before the base's step; return the loss, whether to step the base, whether with a closure."""
        evaluation = begin(run, closure)
        if evaluation is None or evaluation.update is None:
            return None if evaluation is None else evaluation.loss, False, False
        self._evaluation = evaluation
        try:
            if run.structure.multi_base is not None:
                run.structure.multi_base.assign_groups()
            for chain in run.structure.chains:
                turn_off_kernel_for_gradients(evaluation.update, chain)
                turn_off_kernel_for_late_momentum(evaluation.update, chain)
                if chain.leading_on_update and not chain.needs_weights_before:
                    keep_weights_for_on_update(evaluation.update, chain)
            self._replace_rates(run)
        except BaseException:
            self.abandon()
            raise
        return evaluation.loss, True, bool(evaluation.closure_for_base())

    def replay(self) -> Any:
        """Answer the base's own evaluation of the loss."""
        assert self._evaluation is not None
        return self._evaluation.replay()

    def finish(self) -> None:
        """Do what comes after the base's step."""
        update, loss = self._end()
        try:
            for chain in update.run.structure.chains:
                call_on_update_of_chain(update, chain)
        except BaseException:
            abandon(update)
            raise
        finish(update, loss)

    def abandon(self) -> None:
        """Leave an update in which the base's step raised."""
        abandon(self._end()[0])

    def _replace_rates(self, run: Run) -> None:
        for position, group in enumerate(run.param_groups):
            base = run.structure.chain_of(group).base
            lends = type(base).__module__.startswith("torch.optim.") and isinstance(group.get("lr"), float)
            # the tracer sets `capturable` where the base begins on an accelerator, for good
            kept = ("capturable", "lr", "foreach") if lends else ("capturable",)
            self._replaced.append((group, {key: group[key] for key in kept if key in group}))
            if not lends:
                continue
            group["lr"] = self._rate_for(position, group).fill_(group["lr"])
            if group.get("foreach"):
                # run eagerly after all (a retrace too many), a multi-tensor Adam that was asked for refuses a tensor
                group["foreach"] = None

    def _rate_for(self, position: int, group: ParamGroup) -> torch.Tensor:
        """Return the tensor for a group's rate: the same one at every step, or each would be another input.

        It is in main memory, whatever the default device is: from a device, a fused kernel of CUDA would read it as
        float32. Where the update may be captured, it is in float32 beside the parameters: torch makes no CUDA graph of
        what reads main memory.
        """
        captured = group["params"][0].device if group.get("capturable") and group["params"] else None
        device = torch.device("cpu") if captured is None else captured
        rate = self._rates.get(position)
        if rate is None or rate.device != device:
            dtype = torch.float64 if device.type == "cpu" else torch.float32
            rate = self._rates[position] = torch.zeros((), dtype=dtype, device=device)
        return rate

    def _end(self) -> tuple[Update, Any]:
        for group, own in self._replaced:
            group.update(own)
        self._replaced.clear()
        evaluation, self._evaluation = self._evaluation, None
        assert evaluation is not None and evaluation.update is not None
        return evaluation.update, evaluation.loss


def _of_weak(method: "weakref.WeakMethod[Any]") -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        alive = method()
        assert alive is not None  # its owner is calling
        return alive(*arguments)

    return call


def _untraced(function: Function) -> Function:
    untraced: Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return untraced
