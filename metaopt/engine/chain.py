"""A chain: one base with the wrappers around it, over the groups that carry its name; only a chain calls `base.step()`.

It is fixed when a stack is made, and holds what the way in which its base is stepped depends on.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW

from metaopt.errors import HyperparameterError
from metaopt.schedule import Schedule
from metaopt.slots import Scalar, Slot
from metaopt.torch_internals import optimizer_parts, restored_optimizer, without_grad_mode, without_step_hooks
from metaopt.wrapper import Closure, Wrapper

ParamGroup = dict[str, Any]
ParamState = dict[str, Any]

# group entry: the name of the chain that a group belongs to, in a stack of several bases
PART = "metaopt.part"
# state[p][PLACEHOLDER]: 1 if the base has yet to make its state of a parameter, whose entries, if any, only show which
# keys there will be (param_state); an old key, kept for checkpoints
PLACEHOLDER = "metaopt.anew"
# copies of every parameter, and numbers in one tensor, that a wrapper may keep: more is a mistake in writing
MOST_COPIES = 1_000
MOST_NUMBERS = 1_000_000
# updates between two moves of an average that is expected to have moved after a hundred updates
OFTEN = 20
# group entries that choose how the base computes its update, not which numbers come out
RUN_FLAGS = frozenset({"foreach", "fused", "capturable", "differentiable"})
# torch's elementwise optimizers: stepped block by block they compute the same numbers
ELEMENTWISE = frozenset(
    getattr(torch.optim, name)
    for name in ["SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"]
)

# what torch's own bases keep for each parameter, in the order in which their fused kernels take it (see fused)
FUSED_STATE: dict[type, tuple[str, ...]] = {
    Adam: ("exp_avg", "exp_avg_sq", "step"),
    AdamW: ("exp_avg", "exp_avg_sq", "step"),
    SGD: ("momentum_buffer",),
}


@dataclass(frozen=True)
class KeyedSlot:
    """A slot of one wrapper with the key of its tensor in `state[p]`."""

    key: str
    wrapper: Wrapper
    slot: Slot


@dataclass(frozen=True)
class WrapperSlots:
    """What follows from the place of a wrapper in its chain, worked out once."""

    state_keys: tuple[str, ...]  # of the tensors that it keeps for every parameter
    uses_previous: bool
    keeps_moments: bool
    inner_anchor_keys: tuple[str, ...]  # of anchors between the base and the wrapper


class Chain:
    """One base and the wrappers that act on its groups. A stack has one chain, or one for each base of a partition.

    `wrappers` belong to the chain only, `outer` are those around all chains. `ordered` holds both in the order in which
    they act: outer ones before the base, the chain's own, those of the chain behind the base, outer ones.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        wrappers: Sequence[Wrapper] = (),
        schedules: Mapping[str, Schedule] | None = None,
        *,
        outer: Sequence[Wrapper] = (),
        name: str = "",
        fused_by_default: bool = False,
    ) -> None:
        self.base = base
        self.wrappers = tuple(wrappers)
        self.outer = tuple(outer)
        self.schedules = dict(schedules or {})
        self.name = name
        self.fused_by_default = fused_by_default
        self._derive()

    def _derive(self) -> None:
        before = [w for w in (*self.outer, *self.wrappers) if w.runs_before_base()]
        self.written_behind = tuple(w for w in (*self.wrappers, *self.outer) if not w.runs_before_base())
        self.ordered = (*before, *self.written_behind)
        self.labelled = {w.label: w for w in self.ordered}
        self.slots = tuple(_keyed_slots(self.ordered))
        self.moment_slots = tuple(
            (f"{w.label}.{n}", w) for w in self.ordered for n, s in w.active_slots().items() if s.kind == "moments"
        )
        self.early_keys = frozenset(keyed.key for keyed in self.slots if keyed.slot.early)
        self.hyperparameters = {f"{w.label}.{name}": (w, name) for w in self.ordered for name in w.hyperparameters}
        self.counters = {
            f"{w.label}.{name}": counter.initial for w in self.ordered for name, counter in w.counters.items()
        }
        self.scalars: dict[str, tuple[Wrapper, Scalar]] = {
            f"{w.label}.{name}": (w, scalar) for w in self.ordered for name, scalar in w.scalars.items()
        }
        self.resets = tuple(w for w in self.ordered if w.resets_base_state())
        self._wrapper_slots = {id(wrapper): self._slots_of_wrapper(wrapper) for wrapper in self.ordered}
        self.leading_on_update = _first_leading_on_update(self.written_behind)
        self.needs_weights_before = any(
            self.slots_of(w).uses_previous
            or "after_updates" in w.implemented_hooks()
            or ("on_update" in w.implemented_hooks() and w not in self.leading_on_update)
            for w in self.written_behind
        )
        self._prefixes = ("metaopt.", *(f"{label}." for label in self.labelled))
        # the stack's own step calls the hooks
        self._traced_step = without_step_hooks(type(self.base).step)
        self._step = without_grad_mode(self._traced_step)
        # a class whose step somebody has replaced steps by it
        as_torch_wrote_it = inspect.unwrap(self._traced_step).__module__ in ("torch.optim.adam", "torch.optim.sgd")
        self.fused_state = FUSED_STATE.get(type(self.base)) if as_torch_wrote_it else None
        closure = inspect.signature(self._traced_step).parameters.get("closure")
        self.needs_closure = closure is not None and closure.default is inspect.Parameter.empty
        # group entries that the base's constructor takes; others were added by wrappers or by user code
        self.constructor_names = frozenset(inspect.signature(type(self.base)).parameters) - {"params"}

    # ---- which groups and keys belong to it

    def has_group(self, group: ParamGroup) -> bool:
        """Return whether a group belongs to this chain; without a name every group does."""
        return not self.name or group.get(PART) == self.name

    def groups_in(self, groups: list[ParamGroup]) -> list[ParamGroup]:
        """Return the groups that belong to this chain."""
        return [group for group in groups if self.has_group(group)] if self.name else groups

    def is_base_key(self, key: Any) -> bool:
        """Return whether a key of a group or of `state[p]` belongs to the base, not to a wrapper."""
        return not (isinstance(key, str) and key.startswith(self._prefixes))

    def has_base_state(self, param_state: Mapping[str, Any]) -> bool:
        """Return whether the base has begun a parameter: it keeps something that is not a placeholder."""
        return not param_state.get(PLACEHOLDER) and any(map(self.is_base_key, param_state))

    def slots_of(self, wrapper: Wrapper) -> WrapperSlots:
        """Return what follows from the place of a wrapper."""
        return self._wrapper_slots[id(wrapper)]

    def _slots_of_wrapper(self, wrapper: Wrapper) -> WrapperSlots:
        inner = {id(other) for other in self.ordered[: self.ordered.index(wrapper)]}
        kinds = {slot.kind for slot in wrapper.active_slots().values()}
        return WrapperSlots(
            state_keys=tuple(keyed.key for keyed in self.slots if keyed.wrapper is wrapper),
            uses_previous="previous" in kinds,
            keeps_moments="moments" in kinds,
            inner_anchor_keys=tuple(k.key for k in self.slots if k.slot.kind == "anchor" and id(k.wrapper) in inner),
        )

    def frequent_averages(self, group: ParamGroup) -> list[tuple[str, str]]:
        """Return the keys of averages that move at least every few updates, and what keeps each in float32."""
        found = []
        for key, wrapper, slot in (
            (k.key, k.wrapper, k.slot) for k in self.slots if k.slot.kind in ("anchor", "start")
        ):
            every = 1 if wrapper.acts_every is None else group[f"{wrapper.label}.{wrapper.acts_every}"]
            begins = group.get(f"{wrapper.label}.start", 0)
            if "averaged" in wrapper.implemented_hooks() and every <= OFTEN and not begins:
                named = slot.dtype in wrapper.hyperparameters
                found.append((key, f"Give {wrapper.label} {slot.dtype}='float32'" if named else ""))
        return found

    # ---- stepping the base

    def step(self, *closure: Closure, **keywords: Any) -> Any:
        """Call the base's own step, without the hooks and the grad mode that the stack's step has handled already."""
        return self._step(self.base, *closure, **keywords)

    def traced_step(self, *closure: Closure, **keywords: Any) -> None:
        """Call the base's step with its no_grad decorator, which torch.compile must see."""
        self._traced_step(self.base, *closure, **keywords)

    def step_on(self, group: ParamGroup, members: list[torch.Tensor]) -> None:
        """Step the base over some parameters of one group, and over nothing else."""
        groups, params = self.base.param_groups, group["params"]
        self.base.param_groups, group["params"] = [group], members
        try:
            self._step(self.base)
        finally:
            self.base.param_groups, group["params"] = groups, params

    @property
    def begins_at_zero(self) -> bool:
        """Whether the base's state of a parameter, its count included, is all zeros before the first update of it."""
        return type(self.base) in (Adam, AdamW) and self.fused_state is not None

    @property
    def is_elementwise(self) -> bool:
        """Whether the base may be stepped over some parameters at a time with the same result."""
        return type(self.base) in ELEMENTWISE

    def call_mode(self, name: str) -> None:
        """Call `train()` or `eval()` of a base that has it; most bases have no modes."""
        change = getattr(self.base, name, None)
        if change is not None:
            change()

    # ---- copies

    def __getstate__(self) -> dict[str, Any]:
        kept = ("wrappers", "outer", "schedules", "name", "fused_by_default")
        return {"base": optimizer_parts(self.base), **{key: getattr(self, key) for key in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, base=restored_optimizer(*state["base"]))
        self._derive()


def _keyed_slots(wrappers: Iterable[Wrapper]) -> Iterator[KeyedSlot]:
    """Yield the slots with tensors in `state[p]`: all but those of the update in progress, and moments."""
    for wrapper in wrappers:
        for name, slot in wrapper.active_slots().items():
            if slot.kind in ("moments", "previous"):
                continue
            if slot.copies is None:
                yield KeyedSlot(f"{wrapper.label}.{name}", wrapper, slot)
                continue
            for i in range(number_of(slot.copies, wrapper, MOST_COPIES)):
                yield KeyedSlot(f"{wrapper.label}.{name}.{i}", wrapper, slot)


def number_of(given: int | str, wrapper: Wrapper, most: int) -> int:
    """Return a number that is given, or that a hyperparameter holds; raise HyperparameterError beyond `most`."""
    number = int(vars(wrapper)[given]) if isinstance(given, str) else given
    if number > most:
        raise HyperparameterError(
            f"{wrapper.label}: {given} must be <= {most}, got {number}: that many are kept in memory"
        )
    return number


def _first_leading_on_update(behind: Sequence[Wrapper]) -> tuple[Wrapper, ...]:
    """Return the wrappers with `on_update` that act before anything else has moved the weights."""
    found = []
    for wrapper in behind:
        hooks = wrapper.implemented_hooks()
        if "on_update" in hooks:
            found.append(wrapper)
        if hooks & {"after_update", "after_updates"}:
            break
    return tuple(found)


def is_moment(value: Any, key: str, parameter: torch.Tensor) -> bool:
    """Return whether an entry of the base's state is a moment: floating, not `step`, not a lone number."""
    return (
        isinstance(value, torch.Tensor)
        and key != "step"
        and (value.is_floating_point() or value.is_complex())
        and (value.numel() > 1 or parameter.numel() <= 1)
    )
