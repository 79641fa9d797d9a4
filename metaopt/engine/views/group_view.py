"""What wrappers see: one group as aligned lists of local tensors of one device and dtype, and all groups at once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import Any, Literal

import torch

from metaopt.distributed.shards import (
    all_local,
    dense,
    dots_over_shards,
    is_sharded,
    like_parameter,
    local,
    mean_over_shards,
    norm_over_shards,
    norms_over_shards,
    random_like,
    sums_over_shards,
    total_dot,
    total_norm,
)
from metaopt.engine.chain import PLACEHOLDER, Chain, ParamGroup, ParamState, is_moment
from metaopt.engine.fused.lists import are_identical
from metaopt.engine.fused.postponed import PostponedStep
from metaopt.engine.param_state.reset import forget_base_state
from metaopt.engine.structure import PlacedWrapper
from metaopt.engine.update import Params, Update
from metaopt.engine.views.blocks import Rows, block_size, row_ranges
from metaopt.errors import HyperparameterError, StepError
from metaopt.group import Group, Groups, Reduce
from metaopt.module_buffers import buffers_kept
from metaopt.rules import Rule
from metaopt.rules import run as run_rule
from metaopt.slots import Slot
from metaopt.wrapper import Wrapper


class GroupView(Group):
    """Parameters of one group of one device and dtype, or rows of them, for one wrapper, during one update."""

    # blocks that were cut from it: what they changed of fetched copies is written back with its own
    _parts: tuple["GroupView", ...] = ()

    def __init__(
        self,
        update: Update,
        group: ParamGroup,
        wrapper: Wrapper,
        parameters: Params,
        rows: list[Rows] | None = None,
        index: list[int] | None = None,
        updates: int | None = None,
    ) -> None:
        self._update = update
        self._group = group
        self._wrapper = wrapper
        self._rows = rows
        self.parameters = parameters
        self._params: list[torch.Tensor] | None = None
        self.updates = group["metaopt.updates"] if updates is None else updates
        self.index = list(range(len(parameters))) if index is None else index
        # slots kept on another device: copies here, with the originals and their versions
        self._fetched: dict[str, tuple[list[torch.Tensor], list[torch.Tensor], list[int]]] = {}
        # set by an exchange: the means that came from it, and the share of their own that the weights keep
        self.means_of_ways: list[torch.Tensor] | None = None
        self.kept_share = 0.0

    @property
    def params(self) -> list[torch.Tensor]:
        if self._update.postponed:
            self._update.make_postponed()
        if self._params is None:
            self._params = self._cut(all_local(self.parameters))
        return self._params

    # ---- rules of elements

    def apply(self, rule: Rule, numbers: Mapping[str, Any]) -> None:
        graph = rule.graph
        values = {
            n: numbers[n] if n in numbers else self.base_lr if n == "lr" else getattr(self, n) for n in rule.numbers
        }
        postponed = self._update.postponed.get(id(self._group))
        if postponed is not None and self._joins(postponed, rule, values):
            return
        # rows of a tensor do not have its sums
        whole = graph.sums or (self.params[0].device.type != "cpu" and not self.keeps_elsewhere)
        for block in [self] if whole else self.blocks():
            run_rule(graph, block, {name: block._named(name) for name in rule.tensors}, values)
            if "param" in graph.outputs:
                block.move_inner_anchors()
            block.write_back()

    def _joins(self, postponed: PostponedStep, rule: Rule, numbers: Mapping[str, Any]) -> bool:
        """Return whether a rule joins a postponed step of the same parameters, in its pass over memory."""
        wrapper, state = self._wrapper, self._update.run.state
        if self._rows is not None or not are_identical(self.parameters, postponed.params) or self.keeps_elsewhere:
            return False
        if any(isinstance(number, torch.Tensor) for number in numbers.values()):
            return False
        tensors: dict[str, tuple[Any, list[torch.Tensor]]] = {}
        for name in rule.tensors:
            slot = wrapper.slots.get(name)
            if name == "param":
                tensors[name] = name, postponed.params
            elif slot is not None and slot.kind in ("anchor", "start", "zeros"):
                key = f"{wrapper.label}.{name}"
                tensors[name] = key, [state[p][key] for p in self.parameters]
            else:
                return False
        anchors = self._chain.slots_of(wrapper).inner_anchor_keys if "param" in rule.graph.outputs else ()
        return not anchors and postponed.add(rule.graph, tensors, numbers)

    def _named(self, name: str) -> list[torch.Tensor]:
        tensors: list[torch.Tensor] = getattr(self, {"param": "params", "grad": "grads"}.get(name, name))
        return tensors

    # ---- blocks

    def blocks(self) -> list["GroupView"]:
        if self._rows is not None:
            # a block already: `index` is a position within this block, not within the group that it was cut from
            return [self._part(list(range(len(self.parameters))), self._rows)]
        return self.cut(block_size(self.params))

    def cut(self, most: int) -> list["GroupView"]:
        """Return the same in blocks of at most so many elements each, cut between tensors and between rows."""
        if sum(p.numel() for p in self.params) <= most:
            return [self]
        blocks: list[tuple[list[int], list[Rows]]] = []
        filled = 0
        for i, tensor in enumerate(self.params):
            for rows, size in row_ranges(tensor, most):
                if not blocks or filled + size > most:
                    blocks.append(([], []))
                    filled = 0
                blocks[-1][0].append(i)
                blocks[-1][1].append(rows)
                filled += size
        return [self._part(index, rows) for index, rows in blocks]

    def _part(self, index: list[int], rows: list[Rows]) -> "GroupView":
        parameters = [self.parameters[i] for i in index]
        part = GroupView(self._update, self._group, self._wrapper, parameters, rows, index, self.updates)
        if self.keeps_elsewhere:
            self._parts = (*self._parts, part)
        return part

    def _cut(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        if self._rows is None:
            return tensors
        pairs = zip(tensors, self._rows, strict=True)
        return [tensor if rows is None else tensor[rows[0] : rows[1]] for tensor, rows in pairs]

    # ---- hyperparameters and state

    def __getattr__(self, name: str) -> Any:
        wrapper = self.__dict__["_wrapper"]
        key = f"{wrapper.label}.{name}"
        if name in wrapper.hyperparameters or name in wrapper.counters or name in wrapper.scalars:
            return self._group[key]
        slot = wrapper.slots.get(name)
        if slot is None:
            raise AttributeError(_unknown(wrapper, name, Groups, f"it belongs to all groups at once: groups.{name}"))
        self._update.make_postponed()
        if slot.kind == "previous":
            return self._previous(name)
        if slot.kind == "moments":
            moments = self.base_moments
            self._begin_moments(key, moments)
            return {m: self._kept(f"{key}.{m}", slot) for m in moments}
        if slot.copies is not None:
            keys = [k for k in self._chain.slots_of(wrapper).state_keys if k.startswith(f"{key}.")]
            return [self._kept(k, slot) for k in keys]
        return self._kept(key, slot)

    def _begin_moments(self, key: str, moments: dict[str, list[torch.Tensor]]) -> None:
        """Make zeros beside the base's moments where they are not in the state.

        In `on_update` they are stored later; and a checkpoint may have brought the base's moments alone.
        """
        for p in self.parameters:
            param_state, initial = self._update.run.state[p], self._update.pending_state.get(p)
            kept = param_state if initial is None else initial
            for m in moments:
                if f"{key}.{m}" not in param_state:
                    kept.setdefault(f"{key}.{m}", torch.zeros_like(param_state[m]))

    def _previous(self, name: str) -> list[torch.Tensor]:
        before = self._update.weights_before
        if any(p not in before for p in self.parameters):
            raise StepError(f"{self._wrapper.label}.{name} exists only during an update, behind the base")
        return self._cut([before[p] for p in self.parameters])

    def _kept(self, key: str, slot: Slot) -> list[torch.Tensor]:
        update = self._update
        if update.pending_state:
            tensors = all_local([update.state_of(p)[key] for p in self.parameters])
        else:
            state = update.run.state
            tensors = all_local([state[p][key] for p in self.parameters])
        if slot.kind not in ("number", "moments"):
            tensors = self._cut(tensors)
        return self._fetch(key, tensors) if _is_elsewhere(slot, self._wrapper) else tensors

    @property
    def keeps_elsewhere(self) -> bool:
        """Whether the wrapper keeps tensors on another device than the parameters'."""
        return any(_is_elsewhere(slot, self._wrapper) for slot in self._wrapper.active_slots().values())

    def _fetch(self, key: str, originals: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return copies beside the parameters of what is kept on another device; see `write_back`."""
        if key in self._fetched:
            return self._fetched[key][0]
        device = self.params[0].device
        if all(original.device == device for original in originals):
            return originals
        # in stream order behind the copies that went out, so that nothing has to be awaited
        copies = [original.to(device, non_blocking=True) for original in originals]
        self._fetched[key] = copies, originals, [copy._version for copy in copies]
        return copies

    def own_state(self, p: torch.Tensor) -> list[Any]:
        """Return the wrapper's entries in a parameter's state."""
        self._update.make_postponed()
        label = self._wrapper.label
        return [value for key, value in self._update.run.state[p].items() if str(key).startswith(f"{label}.")]

    def write_back(self) -> None:
        """Send what the wrapper changed of fetched copies back, without waiting; see `Run.await_copies`."""
        for copies, originals, versions in self._fetched.values():
            for copy, original, version in zip(copies, originals, versions, strict=True):
                if copy._version != version:
                    original.copy_(copy, non_blocking=True)
                    self._update.run.copies_under_way = True
        self._fetched.clear()
        for part in self._parts:
            part.write_back()

    @property
    def _chain(self) -> Chain:
        return self._update.run.structure.chain_of(self._group)

    # ---- gradients and the update

    @property
    def grads(self) -> list[torch.Tensor]:
        self._update.make_postponed()
        self._update.divide_gradients(self._group)
        self._update.apply_scale(self._chain)
        sparse = any(p.grad is not None and p.grad.is_sparse for p in self.parameters)
        if sparse and not self._wrapper.supports_sparse_grads:
            raise StepError(f"{self._wrapper.label} needs dense gradients, and a parameter's is sparse: leave it out")
        gradients = self._cut([dense(local(p.grad)) for p in self.parameters if p.grad is not None])
        if len(gradients) < len(self.parameters):
            raise StepError(
                f"{self._wrapper.label} reads gradients after the update, but {type(self._chain.base).__name__} "
                f"takes them away inside its step(): the two do not go together"
            )
        return gradients

    @property
    def update(self) -> list[torch.Tensor]:
        update = self._update
        if update.change_for_observers is not None:
            return self._cut([update.change_for_observers[p] for p in self.parameters])
        if any(p not in update.weights_before for p in self.parameters):
            raise StepError(f"{self._wrapper.label}: group.update exists only in on_update and in after_updates")
        return self._cut([update.change_of(p) for p in self.parameters])

    @property
    def param_names(self) -> list[str]:
        self._update.param_names = self._update.param_names or self._update.run.names()
        return [self._update.param_names[p] for p in self.parameters]

    @property
    def numels(self) -> list[int]:
        return [p.numel() for p in self.parameters]

    def base_setting(self, name: str, default: Any = None) -> Any:
        return self._group.get(name, default) if self._chain.is_base_key(name) else default

    @property
    def base_lr(self) -> Any:
        if self._group.get("lr") is None:
            raise StepError(f"{self._wrapper.label} needs a learning rate, {type(self._chain.base).__name__} has none")
        return self._group["lr"]

    @property
    def maximize(self) -> bool:
        return bool(self._group.get("maximize", False))

    @property
    def base_moments(self) -> dict[str, list[torch.Tensor]]:
        self._update.make_postponed()
        state, first = self._update.run.state, self.parameters[0]
        keys = [k for k in _base_keys(self._chain, state[first]) if is_moment(state[first][k], k, first)]
        return {key: [local(state[p][key]) for p in self.parameters] for key in keys}

    def replace_grads(self, gradients: list[torch.Tensor]) -> None:
        self._update.apply_scale(self._chain)  # the factor was meant for the gradients that these replace
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if not is_trained(parameter):
                continue
            parameter.grad = like_parameter(parameter, gradient)
            self._update.with_replaced_grads.append(parameter)
        self._update.gradients_changed()

    def clear_grads(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        self._update.gradients_changed()

    @property
    def mean_way(self) -> list[torch.Tensor]:
        if self.means_of_ways is not None:
            return self.means_of_ways
        anchor = self._wrapper.anchor_across
        if anchor is None:
            raise AttributeError(f"{self._wrapper.label} has no mean_way: its class statement lacks across=")
        return [w.to(a.dtype) - a for w, a in zip(self.params, getattr(self, anchor), strict=True)]

    def set_params(self, tensors: list[torch.Tensor]) -> None:
        if self.kept_share:
            for p, tensor in zip(self.params, tensors, strict=True):
                p.lerp_(tensor.to(p.dtype), 1.0 - self.kept_share)
        else:
            torch._foreach_copy_(self.params, tensors)
        self.move_inner_anchors()

    def move_inner_anchors(self) -> None:
        """Set the anchors between the base and the wrapper to the weights."""
        state = self._update.run.state
        for key in self._chain.slots_of(self._wrapper).inner_anchor_keys:
            # an anchor that has yet to be taken will be taken from the weights of that moment
            having = [i for i, p in enumerate(self.parameters) if key in state[p]]
            for i in having:
                anchor, weights = local(state[self.parameters[i]][key]), self.params[i]
                if self._rows is not None and (rows := self._rows[i]) is not None:
                    anchor = anchor[rows[0] : rows[1]]
                anchor.copy_(weights, non_blocking=True)
                if anchor.device != weights.device:
                    self._update.run.copies_under_way = True

    def reset_base_state(self) -> None:
        self._update.make_postponed()
        forget_base_state(self._update.run, self.parameters, self._chain)

    # ---- numbers

    def norms(self, tensors: list[torch.Tensor], *, rows: bool = False) -> list[torch.Tensor]:
        if not rows:
            return norms_over_shards(tensors, self.parameters)
        return [norm_over_shards(t, p, rows=rows) for t, p in zip(tensors, self.parameters, strict=True)]

    def means(self, tensors: list[torch.Tensor], *, rows: bool = False) -> list[torch.Tensor]:
        return [mean_over_shards(t, p, rows=rows) for t, p in zip(tensors, self.parameters, strict=True)]

    def sum_over_shards(self, numbers: list[torch.Tensor]) -> list[torch.Tensor]:
        return sums_over_shards(numbers, self.parameters)

    def dots(self, a: list[torch.Tensor], b: list[torch.Tensor]) -> list[torch.Tensor]:
        return dots_over_shards(a, b, self.parameters)

    def random_like(self, tensors: Any, distribution: Literal["normal", "uniform"] = "normal") -> Any:
        if isinstance(tensors, torch.Tensor):
            return self._noise(self._index_of(tensors), tensors, distribution)
        return [self._noise(i, tensor, distribution) for i, tensor in enumerate(tensors)]

    def _noise(self, i: int, values: torch.Tensor, distribution: str) -> torch.Tensor:
        update, wrapper, parameter = self._update, self._wrapper, self.parameters[i]
        update.param_names = update.param_names or update.run.names()
        rows = None if self._rows is None else self._rows[i]
        place = wrapper.label, id(parameter), rows
        draw = update.random_draws[place] = update.random_draws.get(place, 0) + 1
        seed = self._group.get(f"{wrapper.label}.seed", 0)
        key = f"{seed}/{wrapper.label}/{update.updates_before}/{update.param_names[parameter]}/{draw}"
        if rows is None or values.shape != self.params[i].shape:
            return random_like(values, parameter, key, distribution)
        # a block of rows gets its rows of the noise of the whole tensor
        whole = torch.empty_like(local(parameter), dtype=values.dtype)
        return random_like(whole, parameter, key, distribution)[rows[0] : rows[1]]

    def _index_of(self, tensor: torch.Tensor) -> int:
        lists: list[list[torch.Tensor | None]] = [
            list(self.params),
            [p.grad for p in self.parameters],
            [self._update.change.get(p) for p in self.parameters],
        ]
        for candidates in lists:
            for i, candidate in enumerate(candidates):
                if candidate is not None and (candidate is tensor or local(candidate).data_ptr() == tensor.data_ptr()):
                    return i
        raise StepError(
            f"{self._wrapper.label}: random_like takes a tensor of group.params, group.grads or group.update, or a "
            f"list aligned with group.params"
        )

    def push(self, name: str, value: torch.Tensor) -> None:
        push(getattr(self, name), value)

    @property
    def num_replicas(self) -> int:
        return self._update.run.replicas.size

    def mean_over_replicas(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return self._update.run.replicas.mean(tensors)

    # ---- the log

    @property
    def is_logged(self) -> bool:
        every = self._wrapper.acts_every
        if every is None:
            return self._update.is_logged
        # called every k updates: the call before a point counts for it
        run, k = self._update.run, int(self._group[f"{self._wrapper.label}.{every}"])
        return run.metrics.wanted(run.updates, k)

    def measure(self, name: str, value: torch.Tensor | float, reduce: Reduce = "mean") -> None:
        self._update.run.metrics.measure(f"{self._wrapper.label}/{name}", value, reduce)


class GroupsView(Groups):
    """All groups that a wrapper acts on, with the parameters that have a gradient in this update."""

    def __init__(self, update: Update, placed: PlacedWrapper, groups: list[ParamGroup] | None = None) -> None:
        self._update = update
        self._wrapper = placed.wrapper
        self._chains = update.run.structure.chains_of(placed)
        self._groups = groups_of(update, placed) if groups is None else groups
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
        return int(self._groups[0]["metaopt.updates"])

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
            like_parameter(p, t.to(p.dtype)) if is_sharded(p) else t
            for view in self
            for p, t in zip(view.parameters, getattr(view, name), strict=True)
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
            raise AttributeError(f"groups.{name}: {of_each}" if kept else _unknown(wrapper, name, Group, of_each))
        first = self._groups[0][key]
        if any(group[key] is not first and group[key] != first for group in self._groups[1:]):
            raise HyperparameterError(
                f"{key} differs between groups, but {wrapper.label} acts on all of them at once: "
                f"give every group the same value"
            )
        return first


# ---- making views


def groups_of(update: Update, placed: PlacedWrapper) -> list[ParamGroup]:
    """Return the groups that a wrapper acts on."""
    groups = update.run.param_groups
    return groups if placed.chain is None else placed.chain.groups_in(groups)


def views_of(
    update: Update, group: ParamGroup, wrapper: Wrapper, parameters: Params, updates: int | None = None
) -> list[GroupView]:
    """Split parameters by device, dtype and the moments that the base keeps of them; no view is empty."""
    if not parameters:
        return []
    kinds: list[Any] = [(p.dtype, p.device) for p in parameters]
    chain = update.run.structure.chain_of(group)
    if chain.slots_of(wrapper).keeps_moments or wrapper.observes:
        moments = [tuple(_base_keys(chain, update.run.state[p])) for p in parameters]
        kinds = list(zip(kinds, moments, strict=True))
    if len(set(kinds)) == 1:
        return [GroupView(update, group, wrapper, parameters, updates=updates)]
    buckets: dict[Any, list[torch.Tensor]] = {}
    for kind, p in zip(kinds, parameters, strict=True):
        buckets.setdefault(kind, []).append(p)
    return [GroupView(update, group, wrapper, bucket, updates=updates) for bucket in buckets.values()]


def block_views_of(
    update: Update, group: ParamGroup, wrapper: Wrapper, parameters: Params, updates: int | None = None
) -> list[GroupView]:
    """Split parameters as `views_of` does; for an elementwise wrapper, further into blocks that fit into a cache.

    An accelerator gets all at once, one launch for everything, if nothing has to be fetched from elsewhere first.
    """
    views = views_of(update, group, wrapper, parameters, updates)
    if not wrapper.elementwise or update.run.structure.chain_of(group).slots_of(wrapper).keeps_moments:
        return views
    cut = [v.params[0].device.type == "cpu" or v.keeps_elsewhere for v in views]
    return [block for v, is_cut in zip(views, cut, strict=True) for block in (v.blocks() if is_cut else [v])]


def updated(update: Update, group: ParamGroup, wrapper: Wrapper) -> Params:
    """Return the group's parameters that have been updated: those that have the wrapper's state, if it has any.

    For a wrapper that uses the previous weights, those of this update: of the others there are none.
    """
    run = update.run
    layout = run.structure.chain_of(group).slots_of(wrapper)
    if layout.uses_previous and update.weights_before:
        members = update.params_of(group)
        return [p for p in members if all(key in run.state[p] for key in layout.state_keys)]
    state = run.state
    if not layout.state_keys:
        return [p for p in group["params"] if p in state or p.grad is not None]
    first, *others = layout.state_keys
    begun = [p for p in group["params"] if p in state]
    found = [p for p in begun if first in state[p]]
    if others:
        found = [p for p in found if all(key in state[p] for key in others)]
    if len(found) < len(begun):  # a client has since written state of the base only: the next update completes it
        run.invalidate()
    return found


def trained(update: Update, group: ParamGroup, wrapper: Wrapper) -> Params:
    """Return what `after_update` acts on: the updated parameters, without the frozen ones if it moves weights."""
    found = updated(update, group, wrapper)
    return found if wrapper.acts_on_frozen else [p for p in found if is_trained(p)]


def is_trained(p: torch.Tensor) -> bool:
    """Return whether a parameter is not frozen; who sets gradients by hand need not set `requires_grad`."""
    return p.requires_grad or p.grad is not None


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
    gradients = [g for group in groups for g in update.params_and_grads(group)[1]]
    if any(map(attrgetter("is_sparse"), gradients)):
        gradients = list(map(dense, gradients))
    total = total_norm(gradients, norm_type)
    if factor is None:
        return total
    return total * (factor.abs().to(total.device) if isinstance(factor, torch.Tensor) else abs(factor))


def _unknown(wrapper: Wrapper, name: str, other: type, of_other: str) -> str:
    """Return why a wrapper finds nothing of a name on what its hook was given."""
    if hasattr(other, name) or name in other.__annotations__:
        return f"{wrapper.label} asks for {name!r}, but {of_other}"
    plain = (
        f"; {name} of the class is read as self.{name}, or declared: {name} = hyper(...)"
        if hasattr(wrapper, name)
        else ""
    )
    return f"{wrapper.label} declares no hyperparameter and no state called {name!r}{plain}"


def push(history: torch.Tensor, value: torch.Tensor) -> None:
    """Append a value to a history, whose oldest value goes; never waits for the device."""
    history.copy_(torch.cat([history[1:], value.detach().reshape(1).to(history)]))


def _is_elsewhere(slot: Slot, wrapper: Wrapper) -> bool:
    """Return whether a slot names a device, or a hyperparameter that does."""
    return slot.device is not None and vars(wrapper).get(slot.device, slot.device) is not None


def _base_keys(chain: Chain, param_state: ParamState) -> list[str]:
    """Return the keys of what the base keeps: none if its entries are placeholders."""
    return [] if param_state.get(PLACEHOLDER) else [key for key in param_state if chain.is_base_key(key)]
