"""A run: a base with its groups and state, what is remembered between two updates, and the values of schedules."""

import math
import weakref
from collections import defaultdict
from collections.abc import Callable
from operator import index
from typing import Any, Protocol

import torch

from metaopt.distributed.replicas import Replicas
from metaopt.engine.chain import ParamGroup, ParamState
from metaopt.engine.fused.lists import FusedLists, KnownEntries
from metaopt.engine.fused.uniform import UniformTensors
from metaopt.engine.run.entries import OWN_SCHEDULES, UPDATES
from metaopt.engine.structure import PlacedWrapper, Structure
from metaopt.errors import HyperparameterError, StepError
from metaopt.metrics import Metrics, rank
from metaopt.misuse.left_out import LeftOut
from metaopt.misuse.past_end import last_update, warn_of_past_end
from metaopt.misuse.second_clip import SecondClip
from metaopt.misuse.sixteen_bits import StillWatch, still_watch
from metaopt.schedule import Schedule
from metaopt.scheduled_values import ScheduledValues
from metaopt.torch_internals import called_by_zero_redundancy_optimizer


class BaseStages(Protocol):
    """What changes the base in the middle of a run; made above the engine, which cannot make a base."""

    def follow(self, run: "Run") -> None:
        """Change the base if the run has come to the next stage."""

    def prepare_load(self, run: "Run", state_dict: Any) -> Callable[[], None]:
        """Have the base of a checkpoint before it is loaded; return what undoes that."""


class ReplicaExchange(Protocol):
    """What a run calls of its exchange with other replicas (`engine.exchange`); `update` is the update in progress."""

    was_due: bool

    def join(self) -> bool:
        """Agree with the other replicas, once, on the weights; return whether they changed here."""

    def count_call(self) -> None:
        """Count a call of `step()`."""

    def act(self, update: Any, placed: PlacedWrapper) -> None:
        """Make what is due of one wrapper."""

    def act_in_skipped_step(self, update: Any) -> None:
        """Make what is due of all wrappers, in a step that makes no update here."""

    def settle(self) -> None:
        """Put what is on its way into the state."""

    def forget(self) -> None:
        """Drop what is on its way, for what a checkpoint has brought."""

    def drop(self) -> None:
        """Drop what is on its way, and what a checkpoint has brought of it."""


class Run:
    """The base, its groups and state, and the engine's memory of them. Made with every stack, and anew in a copy."""

    def __init__(self, structure: Structure, base: torch.optim.Optimizer, metrics: Metrics) -> None:
        self.structure = structure
        self.base = base
        self.metrics = metrics
        self.scheduled: list[ScheduledValues] = []
        self.has_schedules = False
        # the count at which schedules that run to the end of the run are over; infinite once that was warned of
        self.last_update = math.inf
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
        self.stages: BaseStages | None = None
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
        # by id: parameters that a group of this run holds or held, as far as they are alive
        self.known_params: dict[int, weakref.ref[torch.Tensor]] = {}
        # the list of groups, and how many of them the run knows; see `groups.adopt_groups`
        self.adopted: tuple[list[ParamGroup], int] = (self.param_groups, 0)
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

    def knows(self, p: torch.Tensor) -> bool:
        """Return whether a group of this run holds or held a parameter."""
        known = self.known_params.get(id(p))
        return known is not None and known() is p

    def groups_of(self, placed: PlacedWrapper) -> list[ParamGroup]:
        """Return the groups that a wrapper acts on."""
        return self.param_groups if placed.chain is None else placed.chain.groups_in(self.param_groups)

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
        self.known_entries = KnownEntries()
        # by group: parameters and gradients that a fused kernel took
        self.uniform_tensors: dict[int, UniformTensors] = {}
        # the types of the devices beside the processor that hold parameters; None: not known
        self.accelerators: tuple[str, ...] | None = None
        # steps at a rate of 0 had gradients: no client is looking for keys (see `placeholders.is_template_step`)
        self.trains_at_zero = False

    def find_accelerators(self) -> tuple[str, ...]:
        """Return the types of the devices beside the processor that hold parameters now."""
        elsewhere = {p.device.type for group in self.param_groups for p in group["params"] if not p.is_cpu}
        return tuple(sorted(elsewhere))

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
            slots = [(group, self.structure.chain_of(group).frequent_averages(group)) for group in self.param_groups]
            self.still_watch = still_watch(slots, self.state, self.names, self.updates) if rank() == 0 else None

    # ---- schedules

    def schedules_of(self, group: ParamGroup) -> dict[str, Schedule]:
        """Return the schedules that drive a group's entries, by key: its own, and the stack's for what it leaves."""
        shared = self.structure.shared_schedules_of(group)
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
        if self.stages is not None:
            self.stages.follow(self)
        for scheduled, group in zip(self.scheduled, self.param_groups, strict=True):
            scheduled.write(group)

    def warn_of_end(self, updates: int) -> None:
        """Warn, once in a run, that its schedules were over before this update."""
        self.last_update, self._warned_of_end = math.inf, True
        schedules = [scheduled.schedules for scheduled in self.scheduled]
        warn_of_past_end(schedules, self.param_groups, updates, self.structure.total_steps)

    def begin_schedules(self) -> None:
        """Follow the schedules of all groups from the present count on; if one has no value there, nothing changes."""
        total_steps = self.structure.total_steps
        scheduled = [ScheduledValues(self.schedules_of(group), total_steps) for group in self.param_groups]
        for own, group in zip(scheduled, self.param_groups, strict=True):
            own.try_values(group)
        self.scheduled = scheduled
        self.has_schedules = self.stages is not None or any(scheduled.schedules for scheduled in self.scheduled)
        self.adopted = self.param_groups, len(self.param_groups)
        if not self._warned_of_end:
            self.last_update = last_update([scheduled.schedules for scheduled in self.scheduled], total_steps)
        self.write_schedules()

    def change_lr(self, group: ParamGroup, change: Callable[[float], float]) -> None:
        """Replace a group's learning rate; a schedule goes on by the same factor. A rate of 0 stays."""
        position = next(i for i, own in enumerate(self.param_groups) if own is group)
        scheduled, current = self.scheduled[position], group.get("lr")
        scheduled.check_group(group)
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
        self.adopt_rates()
        for group in self.param_groups:
            group[UPDATES] = index(updates)
        self.write_schedules()

    def lr_set_by_client(self, position: int) -> bool:
        """Return whether the rate of a group is a user's own: changed since a schedule wrote it, or built as it is."""
        group = self.param_groups[position]
        if "lr" in self.schedules_of(group):
            return not self.scheduled[position].are_unchanged(group)
        return self.built_with_lr
