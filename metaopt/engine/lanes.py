"""A lane: one base with the wrappers and schedules that are its own, over the groups that carry its name."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from metaopt.engine.handing_over import HOOKS, own_hooks
from metaopt.engine.watching import unhooked
from metaopt.schedule import Schedule
from metaopt.wrapper import Slot, Wrapper

Entry = dict[str, Any]
# state[p][ANEW]: 1 where the base's entries are fillings of a checkpoint; see begun_anew
ANEW = "metaopt.anew"


@dataclass(frozen=True)
class Seat:
    """What follows from where a wrapper stands in a lane: looked up at each update, worked out once."""

    keys: tuple[str, ...]  # of the tensors that it keeps for every parameter
    compares: bool  # with weights from right before the update
    per_moment: bool  # it keeps a tensor for each moment of the base
    nearer_anchors: tuple[str, ...]  # state keys of the anchors between the base and it


class Lane:
    """One base and what belongs to it alone. A stack has one lane; one over several bases has one for each.

    `chain` holds every wrapper that acts on the lane's groups, in the order in which they act: the stack's own
    before the base, the lane's, those of the lane behind it, the stack's.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        wrappers: Sequence[Wrapper] = (),
        schedules: Mapping[str, Schedule] | None = None,
        *,
        name: str = "",
        fused_by_default: bool = False,
    ) -> None:
        self.base = base
        self.wrappers = tuple(wrappers)
        self.schedules = dict(schedules or {})
        self.name = name
        self.fused_by_default = fused_by_default
        self.settle(())

    def settle(self, outer: Sequence[Wrapper]) -> None:
        """Work out what follows from the parts, `outer` being the wrappers around all lanes."""
        before = [w for w in (*outer, *self.wrappers) if w.runs_before_base()]
        behind = [w for w in (*self.wrappers, *outer) if not w.runs_before_base()]
        self.chain = (*before, *behind)
        self.labelled = {w.label: w for w in self.chain}
        self.slots: list[tuple[str, Wrapper, Slot]] = [
            (f"{w.label}.{name}", w, slot) for w in self.chain for name, slot in w.active_slots().items()
        ]
        self._seats = {id(wrapper): self._seat(wrapper) for wrapper in self.chain}
        self.moment_slots = [(key, w) for key, w, slot in self.slots if slot.kind == "moments"]
        self.previous_slots = [key for key, _, slot in self.slots if slot.kind == "previous"]
        self.early_keys = frozenset(key for key, _, slot in self.slots if slot.early)
        self.hyperparameter_keys = {f"{w.label}.{name}": (w, name) for w in self.chain for name in w.hyperparameters}
        self.counter_keys = [f"{w.label}.{name}" for w in self.chain for name in w.counters]
        self.resets = [w for w in self.chain if w.resets_base_state()]
        self._prefixes = ("metaopt.", *(f"{label}." for label in self.labelled))
        # the stack's own step fires the hooks already
        self._step = unhooked(type(self.base).step)
        self._eager_step = _without_grad_mode(self._step)
        closure = inspect.signature(self._step).parameters.get("closure")
        self.needs_closure = closure is not None and closure.default is inspect.Parameter.empty
        # of what stands in a group the base's constructor takes these; the rest belongs to clients and wrappers
        self.constructor_names = frozenset(inspect.signature(type(self.base)).parameters) - {"params"}
        self.pending_scale: torch.Tensor | None = None

    def step(self, *closure: Callable[[], Any]) -> None:
        """Call the base's own step, without what torch put around it and the stack's step has done already."""
        self._eager_step(self.base, *closure)

    def traced_step(self, *closure: Callable[[], Any]) -> None:
        """Call the base's own step as torch traces it."""
        self._step(self.base, *closure)

    def holds(self, entry: Entry) -> bool:
        """Tell whether a group belongs to this lane; without a name every group does."""
        return not self.name or entry.get("metaopt.part") == self.name

    def call_mode(self, name: str) -> None:
        """Call `train()` or `eval()` of a base that has it: most bases have no modes."""
        change = getattr(self.base, name, None)
        if change is not None:
            change()

    def entries(self, groups: list[Entry]) -> list[Entry]:
        """Return the groups that belong to this lane."""
        return [entry for entry in groups if self.holds(entry)] if self.name else groups

    def is_base_key(self, key: Any) -> bool:
        """Tell whether an entry of a group or of `state[p]` belongs to the base, not to a wrapper."""
        return not (self._prefixes and isinstance(key, str) and key.startswith(self._prefixes))

    def seat(self, wrapper: Wrapper) -> Seat:
        """Return what follows from where a wrapper stands."""
        return self._seats[id(wrapper)]

    def _seat(self, wrapper: Wrapper) -> Seat:
        own = [(key, slot) for key, keeper, slot in self.slots if keeper is wrapper]
        nearer = {id(other) for other in self.chain[: self.chain.index(wrapper)]}
        return Seat(
            keys=tuple(key for key, slot in own if slot.kind != "moments"),
            compares=any(slot.kind == "previous" for _, slot in own),
            per_moment=any(slot.kind == "moments" for _, slot in own),
            nearer_anchors=tuple(k for k, keeper, slot in self.slots if slot.kind == "anchor" and id(keeper) in nearer),
        )

    def __getstate__(self) -> dict[str, Any]:
        kept = ("wrappers", "schedules", "name", "fused_by_default")
        return {"base": bare(self.base), **{key: getattr(self, key) for key in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, base=revived(*state["base"]))
        self.settle(())


def _without_grad_mode(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a step without torch's decorator that turns gradients off: the stack has, and refuses `differentiable`."""
    code, names = getattr(step, "__code__", None), getattr(step, "__globals__", {})
    decorated = code is not None and code.co_name == "_use_grad" and names.get("__name__") == "torch.optim.optimizer"
    return getattr(step, "__wrapped__", step) if decorated else step


# a step that a torch scheduler replaced, and what GradScaler and the engine lend for one step
_LENT = frozenset(["step", "_opt_called", "grad_scale", "found_inf", *HOOKS])


def bare(base: torch.optim.Optimizer) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return class and attributes of a base, for a copy or a pickle.

    Its own `__getstate__` would keep three attributes and lose the rest: L-BFGS could not step any more.
    """
    kept = {key: value for key, value in base.__dict__.items() if key not in _LENT}
    return type(base), {**kept, **own_hooks(base)}


def revived(kind: type[torch.optim.Optimizer], attributes: dict[str, Any]) -> torch.optim.Optimizer:
    """Return the base that `bare` described, without hooks of users, as torch's own copies."""
    base = kind.__new__(kind)
    base.__dict__.update({hooks: OrderedDict() for hooks in HOOKS})
    base.__dict__.update(attributes)
    base._patch_step_function()
    return base
