"""The gradients of one evaluation: what wrappers see of them all, their norm, and the factor that they wait for."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from metaopt.engine.lanes import Entry, Lane
from metaopt.engine.members import with_gradient
from metaopt.engine.norms import total_norm
from metaopt.engine.scaling import apply_scale
from metaopt.engine.shards import dense
from metaopt.engine.views import Piece, pieces
from metaopt.errors import HyperparameterError, StepError
from metaopt.wrapper import Groups, Wrapper

if TYPE_CHECKING:
    from metaopt.stack import Stack


class AllGradients(Groups):
    """The gradients of all groups in a wrapper's reach: those of its lane, or all; a lazy factor waits in the lanes."""

    def __init__(self, stack: "Stack", wrapper: Wrapper, lane: Lane | None) -> None:
        self._stack = stack
        self._wrapper = wrapper
        self._lanes = stack.lanes if lane is None else (lane,)

    def __iter__(self) -> Iterator[Piece]:
        for entry in self._entries():
            owners = [p for p in entry["params"] if p.grad is not None]
            yield from pieces(self._stack, entry, self._wrapper, owners)

    def groups_with_state(self) -> Iterator[Piece]:
        for entry in self._entries():
            lane = self._stack.lane_of(entry)
            keys = [key for key, wrapper, _ in lane.slots if wrapper is self._wrapper]
            owners = [p for p in entry["params"] if all(key in self._stack.held(p) for key in keys)]
            yield from pieces(self._stack, entry, self._wrapper, owners)

    def _entries(self) -> list[Entry]:
        groups = self._stack.param_groups
        return groups if len(self._lanes) == len(self._stack.lanes) else self._lanes[0].entries(groups)

    def norm(self, norm_type: float = 2.0) -> torch.Tensor:
        if self._stack.holds_share:
            raise StepError(
                f"{self._wrapper.label} needs the norm over all gradients, and ZeroRedundancyOptimizer gives each rank "
                f"a share of them: leave it out and call torch.nn.utils.clip_grad_norm_(model.parameters(), ...) "
                f"before step(), or shard with FSDP2 (fully_shard) instead"
            )
        return gradient_norm(self._stack, self._lanes, norm_type)

    def scale(self, factor: torch.Tensor) -> None:
        for lane in self._lanes:
            lane.pending_scale = factor if lane.pending_scale is None else lane.pending_scale * factor

    def skip_update(self, reason: str) -> None:
        if not self._wrapper.may_skip_updates:
            raise StepError(f"{self._wrapper.label} holds an update back without declaring may_skip_updates = True")
        self._stack.held_back = reason

    def set_counter(self, name: str, value: int) -> None:
        if name not in self._wrapper.counters:
            raise AttributeError(f"{self._wrapper.label} declares no counter called {name!r}")
        for entry in self._entries():
            entry[f"{self._wrapper.label}.{name}"] = value

    @property
    def is_logged(self) -> bool:
        return self._stack.measuring

    @property
    def has_logger(self) -> bool:
        return self._stack.metrics_of_run.logger is not None

    def measure(self, name: str, value: torch.Tensor | float) -> None:
        self._stack.measure(f"{self._wrapper.label}/{name}", value)

    def __getattr__(self, name: str) -> Any:
        wrapper = self.__dict__["_wrapper"]
        if name not in wrapper.hyperparameters and name not in wrapper.counters:
            raise AttributeError(f"{wrapper.label} declares no hyperparameter called {name!r}")
        key = f"{wrapper.label}.{name}"
        entries = self._entries()
        first = entries[0][key]
        if len(entries) > 1 and any(entry[key] is not first and entry[key] != first for entry in entries):
            raise HyperparameterError(
                f"{key} differs between groups, but {wrapper.label} acts on all gradients at once: "
                f"give every group the same value"
            )
        return first


def gradient_norm(stack: "Stack", lanes: tuple[Lane, ...], norm_type: float = 2.0) -> torch.Tensor:
    """Return the norm over the gradients of some lanes, over groups, devices and shards; pending factors count."""
    factor = lanes[0].pending_scale
    if any(lane.pending_scale is not factor for lane in lanes):
        # lanes that wait for different factors: they cannot be taken out of the norm
        for lane in lanes:
            apply_scale(stack, lane)
        factor = None
    entries = stack.param_groups if len(lanes) == len(stack.lanes) else lanes[0].entries(stack.param_groups)
    gradients = [dense(g) if g.is_sparse else g for e in entries for p in e["params"] if (g := p.grad) is not None]
    total = total_norm(gradients, norm_type)
    return total if factor is None else total * factor.abs().to(total.device)


def filter_gradients(stack: "Stack") -> None:
    """Let the wrappers on gradients act, once per evaluation of the loss, until one holds the update back."""
    stack.held_back = None
    for lane in stack.lanes:
        lane.pending_scale = None
    _sum_duplicates(stack)
    if stack.measuring and not stack.holds_share:
        stack.measure("train/grad_norm", gradient_norm(stack, stack.lanes))
    for wrapper, own in stack.phases.on_gradients:
        if own is not None and not any(with_gradient(entry) for entry in own.entries(stack.param_groups)):
            continue
        wrapper.on_gradients(AllGradients(stack, wrapper, own))
        if stack.held_back is not None:
            return


def _sum_duplicates(stack: "Stack") -> None:
    """Sum what a sparse gradient stores twice: an embedding leaves the rows that it looked up twice so."""
    for entry in stack.base.param_groups:
        for p in entry["params"]:
            if p.grad is not None and p.grad.is_sparse and not p.grad.is_coalesced():
                p.grad = p.grad.coalesce()
