"""What a wrapper sees of one group: aligned lists of local tensors of one device and dtype, changed in place.

The tensors are those of parameters, gradients, state and update themselves, or rows of them.
"""

from collections.abc import Mapping
from itertools import accumulate, pairwise
from operator import itemgetter
from typing import Any

import torch

from metaopt import flat_rules
from metaopt.distributed.shards import all_local, dense, is_sharded, like_parameter, local
from metaopt.engine.chain import PLACEHOLDER, Chain, ParamGroup, ParamState, is_moment
from metaopt.engine.fused.lists import are_identical
from metaopt.engine.fused.postponed import PostponedStep
from metaopt.engine.param_state.base_reset import forget_base_state
from metaopt.engine.run.entries import UPDATES
from metaopt.engine.update.change import Params
from metaopt.engine.update.update import Update
from metaopt.engine.views.blocks import Rows, block_size, row_ranges
from metaopt.engine.views.numbers import GroupNumbers
from metaopt.engine.views.params import is_trained
from metaopt.errors import StepError
from metaopt.flat_memory import parts_of
from metaopt.group import Groups, Reduce
from metaopt.multi_tensor import add_, cast, copies, lerp_, on_accelerator
from metaopt.rules import Rule
from metaopt.rules import run as run_rule
from metaopt.slots import Slot
from metaopt.wrapper import Wrapper


class GroupView(GroupNumbers):
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
        self.updates = group[UPDATES] if updates is None else updates
        self.index = list(range(len(parameters))) if index is None else index
        # slots kept on another device: copies here, with the originals and the copies' versions
        self._fetched: dict[str, tuple[list[torch.Tensor], list[torch.Tensor], list[int]]] = {}
        # set by an exchange: the means that came from it, and the share of their own that the weights keep
        self.mean_displacements: list[torch.Tensor] | None = None
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
        values = rule.numbers_of(self, numbers)
        postponed = self._update.postponed.get(id(self._group))
        if postponed is not None and self._joins(postponed, rule, values):
            return
        # rows of a tensor do not have its sums
        for block in self._whole_tensors() if graph.sums else self.blocks():
            block._run(rule, values)
            if "param" in graph.outputs:
                block.move_inner_anchors()
            block.write_back()

    def _run(self, rule: Rule, values: Mapping[str, Any]) -> None:
        graph, lists = rule.graph, {name: self._named(name) for name in rule.tensors}
        if not flat_rules.fits(graph, [*lists.values()]):
            run_rule(graph, self, lists, values)
            return
        if "param" in lists and "param" not in graph.outputs:
            lists["param"] = self._cut(self._update.change.read_only_weights(self.parameters))
        over_shards = self.sum_over_shards if any(map(is_sharded, self.parameters)) else None
        flat_rules.run(graph, self, lists, values, over_shards)

    def _whole_tensors(self) -> list["GroupView"]:
        """Return the same in blocks of whole tensors, so that copies of them take bounded memory on an accelerator."""
        if not on_accelerator(self.parameters):
            return [self]
        # by the sizes of whole parameters, which are the same on all ranks: each part adds up over them
        ends = [0, *accumulate(len(part) for (part,) in parts_of(self.parameters))]
        if len(ends) == 2:
            return [self]
        rows = self._rows or [None] * len(self.parameters)
        return [self._part([*range(a, b)], rows[a:b]) for a, b in pairwise(ends)]

    def _joins(self, postponed: PostponedStep, rule: Rule, numbers: Mapping[str, Any]) -> bool:
        """Return whether a rule joins a postponed step of the same parameters, in its pass over memory."""
        if self._rows is not None or not are_identical(self.parameters, postponed.params) or self.keeps_elsewhere:
            return False
        anchors = self._chain.slots_of(self._wrapper).inner_anchor_keys if "param" in rule.graph.outputs else ()
        return not anchors and postponed.add(self._wrapper, rule, numbers, self._update.run.state)

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
        if sum(map(torch.Tensor.numel, self.params)) <= most:
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

    def matrices(self) -> list["GroupView"]:
        index = [i for i, p in enumerate(self.parameters) if p.dim() > 1]
        if len(index) == len(self.parameters):
            return [self] if index else []
        rows = self._rows or [None] * len(self.parameters)
        return [self._part(index, [rows[i] for i in index])] if index else []

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
            raise AttributeError(why_unknown(wrapper, name, Groups, f"it belongs to all groups at once: groups.{name}"))
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
        before = self._update.change.weights_before
        if any(p not in before for p in self.parameters):
            raise StepError(f"{self._wrapper.label}.{name} exists only during an update, behind the base")
        return self._cut([before[p] for p in self.parameters])

    def _kept(self, key: str, slot: Slot) -> list[torch.Tensor]:
        update = self._update
        if update.pending_state:
            tensors = all_local([update.state_of(p)[key] for p in self.parameters])
        else:
            state = update.run.state
            tensors = all_local(list(map(itemgetter(key), map(state.__getitem__, self.parameters))))
        if slot.kind not in ("scalar", "moments"):
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

    def write_back(self) -> None:
        """Send what the wrapper changed of fetched copies back, without waiting; see `Run.await_copies`."""
        for fetched, originals, versions in self._fetched.values():
            for copy, original, version in zip(fetched, originals, versions, strict=True):
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
        change = self._update.change
        if change.whole is not None:
            return self._cut([change.whole[p] for p in self.parameters])
        if any(p not in change.weights_before for p in self.parameters):
            raise StepError(f"{self._wrapper.label}: group.update exists only in on_update, after_updates and observe")
        return self._cut(change.of_all(self.parameters))

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
        held = state.get(first) or {}
        keys = [k for k in base_keys(self._chain, held) if is_moment(held[k], k, first)]
        return {key: [local(state[p][key]) for p in self.parameters] for key in keys}

    def copies(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return copies(tensors)

    def cast(self, tensors: list[torch.Tensor], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        return cast(tensors, dtype)

    def add(self, tensors: list[torch.Tensor], others: list[torch.Tensor], *, alpha: float = 1.0) -> None:
        add_(tensors, others, alpha)

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
        if self.mean_displacements is not None:
            return self.mean_displacements
        anchor = self._wrapper.anchor_across
        if anchor is None:
            raise AttributeError(f"{self._wrapper.label} has no mean_way: its class statement lacks across=")
        anchors = getattr(self, anchor)
        return list(torch._foreach_sub(cast(self.params, anchors[0].dtype), anchors))

    def set_params(self, tensors: list[torch.Tensor]) -> None:
        if self.kept_share:
            lerp_(self.params, tensors, 1.0 - self.kept_share)
        else:
            torch._foreach_copy_(self.params, tensors)
        self.move_inner_anchors()

    def move_inner_anchors(self) -> None:
        """Set the anchors between the base and the wrapper to the weights."""
        state = self._update.run.state
        for key in self._chain.slots_of(self._wrapper).inner_anchor_keys:
            # an anchor that has yet to be taken will be taken from the weights of that moment
            having = [i for i, p in enumerate(self.parameters) if key in state[p]]
            beside: list[tuple[torch.Tensor, torch.Tensor]] = []
            for i in having:
                anchor, weights = local(state[self.parameters[i]][key]), self.params[i]
                if self._rows is not None and (rows := self._rows[i]) is not None:
                    anchor = anchor[rows[0] : rows[1]]
                if anchor.device == weights.device:
                    beside.append((anchor, weights))
                else:
                    anchor.copy_(weights, non_blocking=True)
                    self._update.run.copies_under_way = True
            if beside:
                torch._foreach_copy_([anchor for anchor, _ in beside], [weights for _, weights in beside])

    def reset_base_state(self) -> None:
        self._update.make_postponed()
        forget_base_state(self._update.run, self.parameters, self._chain)

    # ---- the log

    @property
    def is_logged(self) -> bool:
        every = self._wrapper.acts_every
        if every is None:
            return self._update.is_logged
        # called every k updates: the call before a point counts for it
        run, k = self._update.run, int(self._group[f"{self._wrapper.label}.{every}"])
        return run.metrics.wanted(self._update.updates_before + 1, k)

    def measure(self, name: str, value: torch.Tensor | float, reduce: Reduce = "mean") -> None:
        self._update.run.metrics.measure(f"{self._wrapper.label}/{name}", value, reduce)


def why_unknown(wrapper: Wrapper, name: str, other: type, of_other: str) -> str:
    """Return why a wrapper finds nothing of a name on what its hook was given."""
    if hasattr(other, name) or name in other.__annotations__:
        return f"{wrapper.label} asks for {name!r}, but {of_other}"
    plain = (
        f"; {name} of the class is read as self.{name}, or declared: {name} = hyper(...)"
        if hasattr(wrapper, name)
        else ""
    )
    return f"{wrapper.label} declares no hyperparameter and no state called {name!r}{plain}"


def _is_elsewhere(slot: Slot, wrapper: Wrapper) -> bool:
    """Return whether a slot names a device, or a hyperparameter that does."""
    return slot.device is not None and vars(wrapper).get(slot.device, slot.device) is not None


def base_keys(chain: Chain, param_state: ParamState) -> list[str]:
    """Return the keys of what the base keeps: none if its entries are placeholders."""
    return [] if param_state.get(PLACEHOLDER) else [key for key in param_state if chain.is_base_key(key)]
