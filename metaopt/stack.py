"""Stack: a base optimizer with wrappers around it, itself a `torch.optim.Optimizer`."""

import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from metaopt.engine import (
    averaging,
    begun_anew,
    compiling,
    composition,
    first_update,
    later_groups,
    loading,
    resetting,
    updating,
)
from metaopt.engine.dividing import Divided, step_bases
from metaopt.engine.fusing import refuses_latecomers
from metaopt.engine.handing_over import HOOKS, of_users, own_hooks_alone, share_hooks
from metaopt.engine.lanes import Entry, Lane, bare, revived
from metaopt.engine.reporting import ReportingScheduler
from metaopt.engine.sharing import made_for_a_share
from metaopt.engine.timetable import Timetable
from metaopt.engine.updating import Phases
from metaopt.engine.watching import watched
from metaopt.errors import StepError
from metaopt.metrics import Metrics
from metaopt.schedule import Schedule
from metaopt.wrapper import Closure, Reduce, Wrapper


class Stack(torch.optim.Optimizer):
    """A base optimizer with wrappers around it: one `step()`, one `state_dict()`.

    Made by `metaopt.build` and `metaopt.wrap`. `wrappers` are in written order; those that act on gradients act
    before the base, those that act on parameters after it.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        wrappers: Sequence[Wrapper] = (),
        *,
        schedules: Mapping[str, Schedule] | None = None,
        total_steps: int | None = None,
        metrics: Metrics | None = None,
        description: Any = None,
        fused_by_default: bool = False,
    ) -> None:
        self.base = base
        self.wrappers = tuple(wrappers)
        self.schedules = dict(schedules or {})
        self.total_steps = total_steps
        self.description = description
        self.fused_by_default = fused_by_default
        self.holds_share = made_for_a_share()
        self.skipped: str | None = None
        self.load_report: loading.LoadReport | None = None
        self.metrics_of_run = metrics or Metrics()
        self._settle_structure()
        composition.check(self)
        share_hooks(base, self)
        self._patch_step_function()
        self.set_aside = first_update.set_constructor_state_aside(base)
        self._built_with_rate = any(float(entry.get("lr", 0.0)) != 0.0 for entry in self.param_groups)
        for position, entry in enumerate(self.param_groups):
            composition.check_group(self, entry, position, built=True)
            composition.complete(self, entry)
        self._know_members(self.param_groups)
        self._fix_timetables()

    # ---- structure that never changes after construction

    def _settle_structure(self) -> None:
        self.lanes: tuple[Lane, ...] = (
            self.base.lanes
            if isinstance(self.base, Divided)
            else (Lane(self.base, fused_by_default=self.fused_by_default),)
        )
        for lane in self.lanes:
            lane.settle(self.wrappers)
        self._lane_names = {lane.name: lane for lane in self.lanes if lane.name}
        self.phases = Phases(self.wrappers, self.lanes)
        self._traced_step = compiling.TracedStep()
        self.needs_closure = any(lane.needs_closure for lane in self.lanes)
        self.awaits_latecomers = any(
            lane.fused_by_default and refuses_latecomers(type(lane.base), first_update.taken_by_constructor(lane.base))
            for lane in self.lanes
        )
        self.measuring = False
        self.inside_averaged = False
        self.held_back: str | None = None
        self.borrowers: list[torch.Tensor] = []
        # what is held for the length of one update
        self.copies: first_update.Copies = {}
        self.lifted: first_update.Copies = {}
        self.moved: dict[int, list[torch.Tensor]] = {}
        self.unfused: list[Entry] = []
        self._known: dict[int, weakref.ref[torch.Tensor]] = {}
        self.look_again()

    def look_again(self) -> None:
        """Look at every parameter's state at the next update: something may have changed it."""
        self.found_whole = -1  # how many parameters were found whole at the last look
        self.kernels_settled = False

    def _fix_timetables(self) -> None:
        """Write the value of every schedule for the update that comes next."""
        self.timetables = [Timetable(self.schedules_of(entry), self.total_steps) for entry in self.param_groups]
        self.settled_groups = self.base.param_groups, len(self.base.param_groups)
        self.scheduled = any(timetable.schedules for timetable in self.timetables)
        for timetable, entry in zip(self.timetables, self.param_groups, strict=True):
            timetable.write(entry)

    def settle_groups(self) -> None:
        """Complete the groups that a client has put here, into `param_groups` or through the base's own methods."""
        groups, (known, number) = self.base.param_groups, self.settled_groups
        if groups is known and len(groups) == number:
            return
        completed = later_groups.complete(self)
        self._know_members(completed)
        if completed or len(groups) != len(self.timetables):
            self._fix_timetables()
        self.look_again()
        self.settled_groups = groups, len(groups)

    def _know_members(self, entries: Sequence[Entry]) -> None:
        self._known.update((id(p), weakref.ref(p)) for entry in entries for p in entry["params"])

    def is_known(self, p: torch.Tensor) -> bool:
        """Tell whether a group was made with this parameter: a client may put others in their places."""
        known = self._known.get(id(p))
        return known is not None and known() is p

    def lane_of(self, entry: Entry) -> Lane:
        """Return the lane that a group belongs to."""
        return self._lane_names[entry["metaopt.part"]] if self._lane_names else self.lanes[0]

    def schedules_of(self, entry: Entry) -> dict[str, Schedule]:
        """Return the schedules that drive a group's entries, by key."""
        return {**self.lane_of(entry).schedules, **self.schedules} if self._lane_names else self.schedules

    def entry_of(self, p: torch.Tensor) -> Entry:
        """Return the group that holds a parameter."""
        return next(entry for entry in self.param_groups if any(p is member for member in entry["params"]))

    def held(self, p: torch.Tensor) -> dict[str, Any]:
        """Return what a wrapper may see of a parameter's state, at its first update also what is yet to be stored."""
        copies = self.copies.get(p)
        held: dict[str, Any] = self.state.get(p, {})
        return held if copies is None else {**held, **copies}

    # ---- shared with the base, also when a client rebinds them

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The live list of group dicts, the base's own."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups
        self.settle_groups()

    @property
    def state(self) -> defaultdict[torch.Tensor, Any]:
        """The live mapping of parameter to state, the base's own."""
        return self.base.state

    @state.setter
    def state(self, state: defaultdict[torch.Tensor, Any]) -> None:
        self.base.state = state
        self.look_again()

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's defaults."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    # ---- what a user reads

    @property
    def updates(self) -> int:
        """How many updates were applied: skipped steps do not count."""
        return int(self.param_groups[0].get("metaopt.updates", 0))

    @property
    def spec(self) -> Any:
        """The stack as a pipeline with live values; `str(opt.spec)` is text that builds it again."""
        if self.description is None:
            raise StepError("this Stack was made without a description; metaopt.build and metaopt.wrap give one")
        return self.description.live(self)

    def scheduler(self) -> LRScheduler:
        """Return a torch scheduler that only reports, for clients that would otherwise make one of their own."""
        return ReportingScheduler(self)

    def record(self, **values: torch.Tensor | float) -> None:
        """Log values as `train/<name>` at the coming update, without waiting for the device."""
        for name, value in values.items():
            self.metrics_of_run.measure(f"train/{name}", value)

    def metrics(self) -> dict[str, float]:
        """Return the latest measurements as `{tag: float}`; waits for the device once."""
        return self.metrics_of_run.latest()

    def close(self) -> None:
        """Write the last measurements and close the log; training may go on without one. Raises LogError."""
        self.metrics_of_run.close()

    def measure(self, tag: str, value: torch.Tensor | float, reduce: Reduce = "mean") -> None:
        """Take one measurement under its whole tag, without waiting for the device."""
        self.metrics_of_run.measure(tag, value, reduce)

    def point_within(self, updates: int) -> bool:
        """Tell whether a point is logged after this update or before the one that follows `updates` later."""
        return self.metrics_of_run.wanted(self.updates, updates)

    def averaged(self, label: str | None = None) -> Any:
        """Return a context in which the parameters hold an average: `with opt.averaged(): validate(model)`.

        With several averages in the stack, `label` chooses. Before the first update the current weights stay.
        Raises StepError where the stack keeps no average or the choice is open.
        """
        self.settle_groups()
        return averaging.swapped(self, label)

    def reset_state(self, *names: str) -> None:
        """Forget what was gathered, for fine-tuning from a checkpoint; without names everything.

        A name is "moments" (the base's state), "averages" (what all wrappers keep), "counters" (updates and with them
        schedules begin at 0) or a wrapper's label. It begins anew at the next update. Raises StepError.
        """
        resetting.reset(self, names)
        self._fix_timetables()
        self.look_again()

    def train(self, mode: bool = True) -> None:
        """Have a base with modes, such as a schedule-free one, train; weights are swapped by the base alone."""
        for lane in self.lanes:
            lane.call_mode("train" if mode else "eval")

    def eval(self) -> None:
        """Have a base with modes, such as a schedule-free one, show the weights that it evaluates."""
        self.train(False)

    # ---- the update

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as torch does; after a load from inside `averaged()` the fast weights return."""
        averaging.before_gradients(self)
        super().zero_grad(set_to_none)

    @watched
    def step(self, closure: Closure | None = None) -> Any:
        """Make one update; return the closure's loss, or None without a closure.

        `skipped` says afterwards why no update was made, or is None. Raises ScheduleConflict, StepError.
        """
        if torch.compiler.is_compiling():
            return self._traced_step(self, closure)
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # what no_grad() does, at a fifth of its cost
        try:
            loss, run, due = updating.begin(self, closure)
            if due:
                try:
                    step_bases(self, *(() if run is None else run.for_base()))
                except BaseException:
                    updating.abandon(self)
                    raise
                updating.finish(self, loss)
        finally:
            torch._C._set_grad_enabled(before)
        return loss

    def lr_is_foreign(self, position: int) -> bool:
        """Tell whether the learning rate of a group was set from outside, since a schedule wrote it or it was built."""
        if "lr" in self.schedules_of(self.param_groups[position]):
            return not self.timetables[position].owns_values(self.param_groups[position])
        return self._built_with_rate

    def forget_base_state(self, owners: Sequence[torch.Tensor], lane: Lane) -> None:
        """Drop the base's entries of some parameters: its next update of them starts lazily."""
        for p in owners:
            held = self.state[p]
            for key in [key for key in held if lane.is_base_key(key)]:
                del held[key]
        self.look_again()

    # ---- groups, checkpoints, copies

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does; wrapper hyperparameters may stand in it under their labelled keys."""
        later_groups.add(self, param_group)
        self._know_members(self.param_groups[-1:])
        self._fix_timetables()
        self.look_again()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that matters to the next update, in torch's form."""
        self.settle_groups()
        begun_anew.fill_in(self)
        for pre_hook in of_users(self._optimizer_state_dict_pre_hooks, self.base):
            pre_hook(self)
        # through the base: some write more than torch does
        with own_hooks_alone(self.base):
            state_dict = self.base.state_dict()
        for post_hook in of_users(self._optimizer_state_dict_post_hooks, self.base):
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a stack's or a bare base's checkpoint, whole or not at all; `load_report` says what came of it.

        Raises CheckpointError, before anything changes, for another base, other groups, shapes or total steps.
        """
        self.settle_groups()
        loading.load(self, state_dict)
        self._fix_timetables()
        self.look_again()
        for hook in of_users(self._optimizer_load_state_dict_post_hooks, self.base):
            hook(self)
        loading.warn(self)

    def __getstate__(self) -> dict[str, Any]:
        own = {key: value for key, value in self.__dict__.items() if key not in _DERIVED}
        return {"base": bare(self.base), "own": own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state["own"], base=revived(*state["base"]))
        share_hooks(self.base, self)
        self.metrics_of_run = Metrics()
        self._settle_structure()
        self._patch_step_function()
        self._know_members(self.param_groups)
        self._fix_timetables()

    def __repr__(self) -> str:
        return f"Stack({self.description!r}, updates={self.updates})" if self.description else super().__repr__()


# worked out anew in a copy; a copy logs nowhere, and has no hooks, as torch's own copies
_DERIVED = frozenset(
    [
        "base",
        "step",
        "_opt_called",
        "metrics_of_run",
        "lanes",
        "_lane_names",
        "phases",
        "_traced_step",
        "timetables",
        "settled_groups",
        "_known",
        *HOOKS,
    ]
)
