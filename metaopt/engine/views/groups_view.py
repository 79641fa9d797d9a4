"""What a wrapper sees of all its groups at once: numbers over all of them, such as the gradient norm, and decisions."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import chain as joined
from operator import attrgetter
from typing import Any

import torch

from metaopt.distributed.norms import total_norm
from metaopt.distributed.shards import dense, placed_like, total_dot
from metaopt.engine.chain import Chain, ParamGroup
from metaopt.engine.run.entries import UPDATES
from metaopt.engine.structure import PlacedWrapper
from metaopt.engine.update.update import Update
from metaopt.engine.views.cutting import views_of
from metaopt.engine.views.group_view import GroupView, why_unknown
from metaopt.engine.views.numbers import push
from metaopt.errors import HyperparameterError, StepError
from metaopt.group import Group, Groups
from metaopt.module_buffers import buffers_kept


class GroupsView(Groups):
    """All groups that a wrapper acts on, with the parameters that have a gradient in this update."""

    def __init__(self, update: Update, placed: PlacedWrapper, groups: list[ParamGroup] | None = None) -> None:
        self._update = update
        self._wrapper = placed.wrapper
        self._chains = update.run.structure.chains_of(placed)
        self._groups = update.run.groups_of(placed) if groups is None else groups
        # the views that the wrapper got, which may hold copies of what is kept on another device
        self._views: list[GroupView] = []

    def __iter__(self) -> Iterator[GroupView]:
        for group in self._groups:
            yield from self._given(views_of(self._update, group, self._wrapper, self._update.params_of(group)))

    def groups_with_state(self) -> Iterator[GroupView]:
        for group in self._groups:
            keys = self._update.run.structure.chain_of(group).slots_of(self._wrapper).state_keys
            having = [p for p in group["params"] if all(key in self._update.state_of(p) for key in keys)]
            yield from self._given(views_of(self._update, group, self._wrapper, having))

    def _given(self, views: list[GroupView]) -> list[GroupView]:
        # what an earlier view of the same parameters has changed must be what these fetch
        self.write_back()
        self._views += views
        return views

    def write_back(self) -> None:
        """Send what the wrapper changed of fetched copies back; see `GroupView.write_back`."""
        for view in self._views:
            view.write_back()

    # ---- numbers

    @property
    def updates(self) -> int:  # type: ignore[override]
        """The number of updates made."""
        return int(self._groups[0][UPDATES])

    def norm(self, norm_type: float = 2.0) -> torch.Tensor:
        if self._update.run.has_zero_shard:
            raise StepError(
                f"{self._wrapper.label} needs the norm over all gradients, and ZeroRedundancyOptimizer gives each rank "
                f"a share of them: leave it out and call torch.nn.utils.clip_grad_norm_(model.parameters(), ...) "
                f"before step(), or shard with FSDP2 (fully_shard) instead"
            )
        return gradient_norm(self._update, self._chains, self._groups, norm_type)

    def norm_of(self, name: str) -> torch.Tensor:
        tensors = [
            placed_like(p, t) for view in self for p, t in zip(view.parameters, getattr(view, name), strict=True)
        ]
        return total_norm(tensors)

    def dot(self, a: str, b: str) -> torch.Tensor:
        products = [total_dot(getattr(view, a), getattr(view, b), view.parameters) for view in self]
        return torch.stack([product.to(products[0].device) for product in products]).sum()

    @property
    def num_replicas(self) -> int:
        return self._update.run.replicas.size

    def mean_over_replicas(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return self._update.run.replicas.mean(tensors)

    def scale(self, factor: torch.Tensor | float) -> None:
        for chain in self._chains:
            self._update.add_scale(chain, factor)

    # ---- decisions and counters

    def buffers_kept(self) -> AbstractContextManager[None]:
        known = self._update.run.model
        return buffers_kept(None if known is None else known())

    @property
    def step_weight(self) -> float | torch.Tensor:
        return self._update.step_weight

    @property
    def is_flush(self) -> bool:
        return self._update.run.flushing

    def skip_update(self, reason: str) -> None:
        if not self._wrapper.may_skip_updates:
            raise StepError(f"{self._wrapper.label} skips an update without declaring may_skip_updates = True")
        self._update.skip_reason = reason

    def set_counter(self, name: str, value: int | float) -> None:
        if name not in self._wrapper.counters:
            raise AttributeError(f"{self._wrapper.label} declares no counter called {name!r}")
        key = f"{self._wrapper.label}.{name}"
        for group in self._groups:
            self._update.counters_before.append((group, key, group[key]))
            group[key] = value

    def change_lr(self, change: Callable[[float], float]) -> None:
        for group in self._groups:
            self._update.run.change_lr(group, change)

    def push(self, name: str, value: torch.Tensor) -> None:
        push(getattr(self, name), value)

    @property
    def is_logged(self) -> bool:
        return self._update.is_logged

    @property
    def has_logger(self) -> bool:
        return self._update.run.metrics.logger is not None

    def measure(self, name: str, value: torch.Tensor | float) -> None:
        self._update.run.metrics.measure(f"{self._wrapper.label}/{name}", value)

    def measure_tensors(self, name: str, tensors: Sequence[str], values: torch.Tensor, most: int | None = None) -> None:
        self._update.run.metrics.measure_tensors(f"{self._wrapper.label}/{name}", tensors, values, most)

    def measure_histogram(self, name: str, edges: Sequence[float], counts: torch.Tensor) -> None:
        self._update.run.metrics.measure_histogram(f"{self._wrapper.label}/{name}", edges, counts)

    def __getattr__(self, name: str) -> Any:
        wrapper = self.__dict__["_wrapper"]
        key = f"{wrapper.label}.{name}"
        if name in wrapper.scalars:
            if wrapper.scalars[name].per == "group" and len(self._groups) > 1:
                raise AttributeError(f"{key} is a number of each group: read it from the groups, or declare per='run'")
            return self._groups[0][key]
        if name not in wrapper.hyperparameters and name not in wrapper.counters:
            of_each = f"each group has its own: for group in groups: group.{name}"
            kept = name in wrapper.slots
            raise AttributeError(f"groups.{name}: {of_each}" if kept else why_unknown(wrapper, name, Group, of_each))
        first = self._groups[0][key]
        if any(group[key] is not first and group[key] != first for group in self._groups[1:]):
            raise HyperparameterError(
                f"{key} differs between groups, but {wrapper.label} acts on all of them at once: "
                f"give every group the same value"
            )
        return first


def gradient_norm(
    update: Update, chains: Sequence[Chain], groups: list[ParamGroup], norm_type: float = 2.0
) -> torch.Tensor:
    """Return the norm over the gradients of some groups, over devices and shards; pending factors count."""
    factor = update.pending_scale.get(chains[0])
    if any(update.pending_scale.get(chain) is not factor for chain in chains):
        # chains with different pending factors: these cannot be taken out of the norm
        for chain in chains:
            update.apply_scale(chain)
        factor = None
    for group in groups:
        update.divide_gradients(group)
    lists = [update.params_and_grads(group)[1] for group in groups]
    gradients = lists[0] if len(lists) == 1 else list(joined.from_iterable(lists))
    dtypes = set(map(update.uniform_dtype, groups))
    uniform = len(dtypes) == 1 and None not in dtypes
    if not uniform and any(map(attrgetter("is_sparse"), gradients)):
        gradients = list(map(dense, gradients))
    total = total_norm(gradients, norm_type, uniform=uniform)
    if factor is None:
        return total
    return total * (factor.abs().to(total.device) if isinstance(factor, torch.Tensor) else abs(factor))
