"""`torch.compile(opt.step)`: the base's step is compiled as torch compiles it, everything around it runs eagerly.

torch's tracer knows optimizers: it runs a base's `_init_group` for real and guards on the base's groups and state, so
a compiled base step outlives changing gradients and, after one retrace, changing counts. It knows no wrappers: traced,
they would guard on every gradient tensor, which `zero_grad` frees, and specialise on which of the k updates of a cycle
this is, a retrace each until the tracer gives up. They are a few multi-tensor calls that a compiler could not make
faster. Hence three parts: before the base, the base, after the base, and only the middle one is traced.

A rate that changes is a retrace per value where a base passes it on as a number (SGD, or any multi-tensor path), so
torch's own bases are handed theirs as a tensor while they are traced. What makes the base's state tensors anew (a
Lookahead that resets the momentum) costs a retrace each time: after eight torch runs that base eagerly, and says so.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from metaopt.engine import updating
from metaopt.engine.dividing import Divided
from metaopt.engine.evaluation import Evaluation
from metaopt.engine.lanes import Entry
from metaopt.wrapper import Closure

if TYPE_CHECKING:
    from metaopt.stack import Stack


Function = TypeVar("Function", bound=Callable[..., Any])


class TracedStep:
    """What `Stack.step` does while it is traced."""

    def __init__(self) -> None:
        # made once per stack: the tracer guards on the identity of what it must not enter
        self._begin = _untraced(self.begin)
        self._finish = _untraced(self.finish)
        self._abandon = _untraced(self.abandon)
        self._replay = _untraced(self.replay)
        self._run: Evaluation | None = None
        self._rates: dict[int, torch.Tensor] = {}
        self._lent: list[tuple[Entry, Entry]] = []

    @torch.no_grad()
    def __call__(self, stack: "Stack", closure: Closure | None) -> Any:
        loss, due, evaluates = self._begin(stack, closure)
        if not due:
            return loss
        try:
            for lane in stack.lanes:
                if evaluates:
                    lane.traced_step(self._replay)
                else:
                    lane.traced_step()
        except BaseException:
            self._abandon(stack)
            raise
        self._finish(stack, loss)
        return loss

    def begin(self, stack: "Stack", closure: Closure | None) -> tuple[Any, bool, bool]:
        """Do what comes before the base's step; return the loss, whether the base is due, and takes a closure."""
        loss, self._run, due = updating.begin(stack, closure)
        if not due:
            return loss, False, False
        if isinstance(stack.base, Divided):
            stack.base.deal()
        self._lend_rates(stack)
        return loss, True, self._run is not None and bool(self._run.for_base())

    def replay(self) -> Any:
        """Answer the base's own evaluation of the loss."""
        assert self._run is not None
        return self._run.replay()

    def finish(self, stack: "Stack", loss: Any) -> None:
        """Do what comes after the base's step."""
        self._take_rates_back()
        updating.finish(stack, loss)

    def abandon(self, stack: "Stack") -> None:
        """Leave an update in which the base's step raised."""
        self._take_rates_back()
        updating.abandon(stack)

    def _lend_rates(self, stack: "Stack") -> None:
        for position, entry in enumerate(stack.param_groups):
            base = stack.lane_of(entry).base
            if not type(base).__module__.startswith("torch.optim.") or not isinstance(entry.get("lr"), float):
                continue
            # the same tensor at every step, or each would be another input
            rate = self._rates.setdefault(position, torch.zeros((), dtype=torch.float64))
            self._lent.append((entry, {key: entry[key] for key in ("lr", "foreach") if key in entry}))
            entry["lr"] = rate.fill_(entry["lr"])
            if entry.get("foreach"):
                # run eagerly after all (a retrace too many), a multi-tensor Adam that was asked for refuses a tensor
                entry["foreach"] = None

    def _take_rates_back(self) -> None:
        for entry, own in self._lent:
            entry.update(own)
        self._lent.clear()
        self._run = None


def _untraced(function: Function) -> Function:
    untraced: Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return untraced
