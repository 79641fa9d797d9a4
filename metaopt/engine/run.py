"""A run: a base with its groups and state, and what is remembered between two updates."""

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection
from operator import index
from typing import Any, Protocol

import torch
from torch.utils.weak import WeakIdKeyDictionary

from metaopt.distributed.replicas import Replicas
from metaopt.engine.chain import MOST_NUMBERS, Chain, ParamGroup, ParamState, number_of
from metaopt.engine.fused.lists import FusedLists
from metaopt.engine.structure import PlacedWrapper, Structure, validate_group
from metaopt.errors import HyperparameterError, StepError
from metaopt.group_entries import (
    NO_DECAY,
    OWN_VALUES,
    TIED,
    lr_scale_of,
    mark_no_decay,
    name_like_others,
    rate_of,
    with_list,
)
from metaopt.metrics import Metrics, rank
from metaopt.misuse.left_out import LeftOut
from metaopt.misuse.past_end import last_update, warn_of_past_end
from metaopt.misuse.second_clip import SecondClip
from metaopt.misuse.sixteen_bits import StillWatch, still_watch
from metaopt.schedule import Schedule
from metaopt.scheduled_values import ScheduledValues
from metaopt.slots import Scalar
from metaopt.torch_internals import called_by_zero_redundancy_optimizer
from metaopt.wrapper import Wrapper

# group entries of the engine: the count of updates is the run's, the same in every group
UPDATES = "metaopt.updates"
# the label of the average that the parameters hold now, or "" (a key of old, kept for checkpoints)
AVERAGE_SHOWN = "metaopt.swapped"
# "", or the state holds only placeholders (see param_state): "asked" and the group entries that the base adds, if a
# client wants to see the keys; "made" in a checkpoint from before the base's first update
TEMPLATE = "metaopt.template"
# where in `Run.own_schedules` those of this group are; a group that follows the stack's schedules has no such entry
OWN_SCHEDULES = "metaopt.own_schedules"
# the rate that a group was built with, None under a schedule: a client that changes the rate later has not asked for
# another setting
BUILT_LR = "metaopt.built_lr"
# how often `step()` was called, if wrappers exchange means over replicas: skipped or not, all replicas make the same
STEPS = "metaopt.steps"
# of the entries of a checkpoint; 1 is everything before the entry itself (docs/upgrading.md)
FORMAT_KEY, FORMAT = "metaopt.format", 2


class Stages(Protocol):
    """What changes the base in the middle of a run; made above the engine, which cannot make a base."""

    def follow(self, run: "Run") -> None:
        """Change the base if the run has come to the next stage."""

    def prepare_load(self, run: "Run", state_dict: Any) -> Callable[[], None]:
        """Have the base of a checkpoint before it is loaded; return what undoes that."""


class ReplicaExchange(Protocol):
    """What a run calls of its exchange with other replicas (`engine.exchange`); `update` is the update in progress."""

    met: bool

    def join(self) -> bool:
        """Agree with the other replicas, once, on the weights; return whether they changed here."""

    def count_step(self) -> None:
        """Count a call of `step()`."""

    def act(self, update: Any, placed: PlacedWrapper) -> None:
        """Make what is due of one wrapper."""

    def take_part(self, update: Any) -> None:
        """Make what is due of all wrappers, in a step that makes no update here."""

    def settle(self) -> None:
        """Put what is on its way into the state."""

    def forget(self) -> None:
        """Drop what is on its way."""


class Run:
    """The base, its groups and state, and the engine's memory of them. Made with every stack, and anew in a copy."""

    def __init__(self, structure: Structure, base: torch.optim.Optimizer, metrics: Metrics) -> None:
        self.structure = structure
        self.base = base
        self.metrics = metrics
        self.scheduled: list[ScheduledValues] = []
        self.has_schedules = False
        # the count at which schedules that run to the end of the run are over; infinite once that was warned of
        self._last_update = math.inf
        self._warned_of_end = False
        # by group (see OWN_SCHEDULES): schedules by key, None for a constant beside a schedule of the stack
        self.own_schedules: list[dict[str, Schedule | None]] = []
        # what the base's constructor made of parameters that it has not updated yet
        self.constructor_state: dict[torch.Tensor, ParamState] = {}
        # the names of chains whose base makes state in its constructor
        self.constructor_chains: set[str] = set()
        self.inside_averaged = False
        # a `step()` of `Stack.flush`, and how much the gradients of the coming step count
        self.flushing = False
        self.step_weight: float | torch.Tensor = 1.0
        self.skipped: str | None = None
        # a rank's share of the parameters: a norm over them is not the model's
        self.has_zero_shard = called_by_zero_redundancy_optimizer()
        # None: the base works its rate out itself
        rates = [group.get("lr", 0.0) for group in self.param_groups]
        self.built_with_lr = any(rate is None or isinstance(rate, Schedule) or float(rate) != 0.0 for rate in rates)
        # parameters of the model that no group holds, while they may begin to train
        self.left_out: LeftOut | None = None
        # what changes the base in the middle of the run, if anything does
        self.stages: Stages | None = None
        # a clip before the stack's own, looked for in the first updates
        self.second_clip: SecondClip | None = None
        # the processes that train copies of the model, and what is exchanged with them, if wrappers take means
        self.replicas = Replicas()
        self.exchange: ReplicaExchange | None = None
        # what has 16 bits, and whether it moves: looked at once
        self.still_watch: StillWatch | None = None
        self._watched_16_bits = False
        # what the stack was built over, if that was a module; not held, because a model may be large
        self.model: weakref.ref[torch.nn.Module] | None = None
        # tensors in main memory are being written to from an accelerator
        self.copies_under_way = False
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._adopted: tuple[list[ParamGroup], int] = (self.param_groups, 0)
        self.invalidate()

    # ---- shared with the base, also if a client replaces them

    @property
    def param_groups(self) -> list[ParamGroup]:
        """The live list of group dicts, the base's own."""
        return self.base.param_groups

    @property
    def state(self) -> defaultdict[torch.Tensor, Any]:
        """The live mapping of parameter to state, the base's own."""
        return self.base.state

    @property
    def updates(self) -> int:
        """How many updates were made."""
        return int(self.param_groups[0].get(UPDATES, 0))

    @property
    def is_differentiable(self) -> bool:
        """Whether the user differentiates through updates (torch's `differentiable=True`)."""
        return bool(self.base.defaults.get("differentiable"))

    def group_of(self, p: torch.Tensor) -> ParamGroup:
        """Return the group that holds a parameter."""
        return next(group for group in self.param_groups if any(p is member for member in group["params"]))

    def names(self) -> dict[torch.Tensor, str]:
        """Return a name for every parameter: the user's, or its position in the run."""
        found: dict[torch.Tensor, str] = {}
        for group in self.param_groups:
            names = group.get("param_names")
            if names is None or len(names) != len(group["params"]):
                names = [f"#{len(found) + i}" for i in range(len(group["params"]))]
            found.update(zip(group["params"], names, strict=True))
        return found

    # ---- what is remembered of the state

    def invalidate(self) -> None:
        """Look at every parameter's state at the next update: something may have changed it."""
        # parameters whose state lacks something; None: not known
        self.incomplete: list[torch.Tensor] | None = None
        self.state_size = -1
        # by group: parameters without a momentum buffer, of a fused SGD
        self.without_momentum: dict[int, list[torch.Tensor]] = {}
        # by group: what its fused kernel takes
        self.fused_lists: dict[int, FusedLists] = {}

    def await_copies(self) -> None:
        """Wait for copies to main memory, before anything but the device reads them."""
        if self.copies_under_way:
            for device in {p.device for group in self.param_groups for p in group["params"] if p.device.type != "cpu"}:
                torch.accelerator.synchronize(device)
            self.copies_under_way = False

    def watch_16_bits(self) -> None:
        """After the first update: keep samples of weights and averages of 16 bits, to see whether they move."""
        if not self._watched_16_bits:
            self._watched_16_bits = True
            slots = [(group, self.structure.chain_of(group).averages(group)) for group in self.param_groups]
            self.still_watch = still_watch(slots, self.state, self.names, self.updates) if rank() == 0 else None

    # ---- schedules

    def schedules_of(self, group: ParamGroup) -> dict[str, Schedule]:
        """Return the schedules that drive a group's entries, by key: its own, and the stack's for what it leaves."""
        shared = self.structure.schedules_of(group)
        if OWN_SCHEDULES not in group:
            return shared
        if group[OWN_SCHEDULES] >= len(self.own_schedules):
            raise HyperparameterError(
                f"group {group.get('name', '')} had schedules of its own, which a checkpoint does not hold: give them "
                f"again, by add_param_group before the checkpoint is loaded"
            )
        every: dict[str, Schedule | None] = {**shared, **self.own_schedules[group[OWN_SCHEDULES]]}
        return {key: schedule for key, schedule in every.items() if schedule is not None}

    def write_schedules(self) -> None:
        """After an update, set every scheduled value for the next one, which may be the first one of another base."""
        updates = self._set_scheduled_values()
        if updates > self._last_update:  # last, because a warning may be made an error
            self._last_update, self._warned_of_end = math.inf, True
            schedules = [scheduled.schedules for scheduled in self.scheduled]
            warn_of_past_end(schedules, self.param_groups, updates, self.structure.total_steps)

    def _set_scheduled_values(self) -> int:
        """Set the values for the next update, and return how many were made."""
        if self.stages is not None:
            self.stages.follow(self)
        updates = 0
        for scheduled, group in zip(self.scheduled, self.param_groups, strict=True):
            updates = scheduled.write(group)
        return updates

    def begin_schedules(self) -> None:
        """Follow the schedules of all groups from the present count on."""
        run = self.structure.total_steps
        self.scheduled = [ScheduledValues(self.schedules_of(group), run) for group in self.param_groups]
        self.has_schedules = self.stages is not None or any(scheduled.schedules for scheduled in self.scheduled)
        self._adopted = self.param_groups, len(self.param_groups)
        if not self._warned_of_end:
            self._last_update = last_update([scheduled.schedules for scheduled in self.scheduled], run)
        self._set_scheduled_values()

    def change_lr(self, group: ParamGroup, change: Callable[[float], float]) -> None:
        """Replace a group's learning rate; a schedule goes on by the same factor. A rate of 0 stays."""
        position = next(i for i, own in enumerate(self.param_groups) if own is group)
        scheduled, current = self.scheduled[position], group.get("lr")
        scheduled.raise_if_changed(group)
        if current is None:
            raise StepError(f"group {group.get('name', position)} has no learning rate that could be changed")
        old = float(current)
        new = change(old)
        if not old or new == old:
            return
        if "lr" in scheduled.schedules:
            scheduled.scale_rate(group, new / old)
        elif isinstance(current, torch.Tensor):
            current.fill_(new)
        else:
            group["lr"] = new

    def adopt_rates(self) -> None:
        """Let rates that were set by hand under a schedule be factors of it, before anything else reads them."""
        for scheduled, group in zip(self.scheduled, self.param_groups, strict=False):
            scheduled.adopt_rate(group)

    def count_from(self, updates: int) -> None:
        """Set the count of updates; schedules follow. Raises StepError for what is not a count."""
        if isinstance(updates, bool) or not hasattr(updates, "__index__") or index(updates) < 0:
            raise StepError(f"updates must be an integer from 0 up, got {updates!r:.60}")
        for group in self.param_groups:
            group[UPDATES] = index(updates)
        self._set_scheduled_values()

    def lr_set_by_client(self, position: int) -> bool:
        """Return whether user code changed a group's learning rate since a schedule wrote it or the run was made."""
        group = self.param_groups[position]
        if "lr" in self.schedules_of(group):
            return not self.scheduled[position].are_unchanged(group)
        return self.built_with_lr

    # ---- groups

    def complete_groups(self) -> None:
        """Validate and complete the groups that the base was built with."""
        for position, group in enumerate(self.param_groups):
            # what it holds of the base's may be defaults: what the user gave was read before
            self.validate_group(group, position, {key for key in group if "." in key})
            self.complete_group(group)
        self.know_members()
        self.begin_schedules()

    def adopt_groups(self) -> None:
        """Complete the groups that a client has put into `param_groups`, or added through the base's own methods."""
        groups, (adopted, number) = self.param_groups, self._adopted
        if groups is adopted and len(groups) == number:
            return
        if groups is adopted:
            self.adopt_rates()
        new = any(UPDATES not in group for group in groups)
        count = next((group[UPDATES] for group in groups if UPDATES in group), 0)
        for position, group in enumerate(groups):
            if UPDATES in group:
                continue
            if self.structure.multi_base is not None:
                group["metaopt.part"] = self.structure.multi_base.chain_for(group).name
            shared, defaults = self.structure.schedules_of(group), self.structure.chain_of(group).base.defaults
            given = {k for k in group if "." in k or (k in shared and group[k] != defaults.get(k))}
            self.validate_group(group, position, given)
            group[UPDATES] = count
            self.complete_group(group)
        self._part_scalars()
        self.know_members()
        if new or len(groups) != len(self.scheduled):
            self.begin_schedules()
        self.invalidate()
        self._adopted = groups, len(groups)

    def add_group(self, param_group: ParamGroup) -> None:
        """Add a group to the base and complete it; nothing changes if it is refused."""
        group = with_list(param_group)
        self.adopt_rates()
        if self.structure.multi_base is not None:
            group["metaopt.part"] = self.structure.multi_base.chain_for(group).name
        mark_no_decay(group)
        self.validate_group(group, len(self.param_groups), group.keys())
        name_like_others(group, self.param_groups)
        before = set(self.state)
        self.base.add_param_group(group)
        for p in [p for p in self.state if p not in before]:
            self.constructor_state[p] = self.state.pop(p)
        group[UPDATES] = self.updates
        self.complete_group(group)
        self.know_members()
        self.begin_schedules()
        self.invalidate()

    def validate_members(self, group: ParamGroup) -> None:
        """Refuse a group whose parameters a client has replaced by another number; names may be out of date."""
        names, members = group.get("param_names"), group["params"]
        if names is not None and len(names) != len(members) and not all(p in self._known for p in members):
            raise StepError(
                f"a group of {len(names)} parameters ({', '.join(names[:3])}, ...) holds {len(members)} now: a client "
                f"has put others in their places. DeepSpeed's ZeRO does so: a rank gets a flat share, of which norms, "
                f"shapes and names are not the model's. Shard with FSDP2 (fully_shard) instead"
            )

    def know_members(self) -> None:
        """Remember which parameters the groups hold; see `validate_members`."""
        for group in self.param_groups:
            for p in group["params"]:
                self._known[p] = True

    def validate_group(self, group: ParamGroup, position: int, given: Collection[str]) -> None:
        """Raise HyperparameterError for a group that cannot join the others; read what the user has `given`."""
        begun = self.param_groups and UPDATES in self.param_groups[0]
        others = [other for other in self.param_groups if other is not group]
        validate_group(self.structure, group, position, given, others, self.updates if begun else None)

    def complete_group(self, group: ParamGroup) -> None:
        """Give a group the entries that wrappers and engine keep in it, and apply its `lr_scale` once."""
        chain = self.structure.chain_of(group)
        group.setdefault(UPDATES, 0)
        group[FORMAT_KEY] = FORMAT
        if self.structure.exchanges:
            group.setdefault(STEPS, next((g[STEPS] for g in self.param_groups if STEPS in g), 0))
        group.setdefault("metaopt.total_steps", self.structure.total_steps)
        group.setdefault(AVERAGE_SHOWN, "")
        group.setdefault(TEMPLATE, "")
        if OWN_VALUES in group:
            self.own_schedules.append(group.pop(OWN_VALUES))
            group[OWN_SCHEDULES] = len(self.own_schedules) - 1
        scale = lr_scale_of(group)
        if "metaopt.lr_scale" not in group:
            group["metaopt.lr_scale"] = scale
            if scale != 1.0 and "lr" not in self.schedules_of(group):
                if group.get("lr") is None:
                    raise HyperparameterError(
                        f"lr_scale={scale:g}: {type(self.base).__name__} works its learning rate out itself, so that "
                        f"there is nothing to scale; give it an lr, or leave lr_scale out"
                    )
                group["lr"] = group["lr"] * scale
        group.setdefault(BUILT_LR, None if "lr" in self.schedules_of(group) else rate_of(group))
        group.pop(NO_DECAY, None)
        group.pop(TIED, None)
        # the state of a part without hyperparameters is known as that part's by this entry
        group["metaopt.labels"] = ",".join(chain.labelled)
        for key, (wrapper, name) in chain.hyperparameters.items():
            value = getattr(wrapper, name)
            group.setdefault(key, 0.0 if isinstance(value, Schedule) else value)
        for key, initial in chain.counters.items():
            # a group that comes later joins the others' count
            group.setdefault(key, next((g[key] for g in self.param_groups if key in g), initial))
        self.place_scalars(group, chain)

    def place_scalars(self, group: ParamGroup, chain: Chain) -> None:
        """Give a group the scalars of its wrappers, beside its parameters; those of the whole run are one tensor."""
        device = group["params"][0].device if group["params"] else torch.device("cpu")
        wide = any(p.dtype in (torch.float64, torch.complex128) for p in group["params"])
        dtype = torch.float64 if wide else torch.float32
        for key, (wrapper, scalar) in chain.scalars.items():
            shared = None
            if scalar.per == "run":
                peers = self.param_groups if wrapper in chain.outer else chain.groups_in(self.param_groups)
                shared = next((g[key] for g in peers if g is not group and key in g), None)
            if shared is not None:
                group[key] = shared
            elif key in group:
                group[key] = group[key].to(device=device)
            else:
                group[key] = _new_scalar(scalar, wrapper, dtype, device)

    def _part_scalars(self) -> None:
        """Give each group scalars of its own if a client has split a group: copies of its entries hold one tensor."""
        held: set[int] = set()
        for group in self.param_groups:
            for key, (_, scalar) in self.structure.chain_of(group).scalars.items():
                if scalar.per != "run" and id(group[key]) in held:
                    group[key] = group[key].clone()
                held.add(id(group[key]))


def _new_scalar(scalar: Scalar, wrapper: Wrapper, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    size = () if scalar.size is None else (number_of(scalar.size, wrapper, MOST_NUMBERS),)
    return torch.full(size, scalar.initial, dtype=dtype, device=device)
