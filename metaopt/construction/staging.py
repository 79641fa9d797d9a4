"""Bases that follow one another in one stack: each is made when its turn comes, and the wrappers go on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any

import torch

from metaopt.construction.grouping import Group
from metaopt.construction.making import arrange, make_base, scheduled
from metaopt.engine.chain import PLACEHOLDER, RUN_FLAGS, Chain, ParamGroup
from metaopt.engine.multi_base import Sequencer
from metaopt.engine.run.entries import BUILT_LR, OWN_SCHEDULES
from metaopt.engine.run.groups import complete_group
from metaopt.engine.run.run import Run
from metaopt.engine.structure import Structure
from metaopt.errors import HyperparameterError, SpecError
from metaopt.group_entries import NO_DECAY, OWN_VALUES, is_decay
from metaopt.refusals import validate
from metaopt.schedule import Curve, Schedule, as_schedule
from metaopt.scheduled_values import LR_FACTOR, LR_SCALE
from metaopt.specs.pipeline import Part
from metaopt.torch_internals import HOOK_TABLES
from metaopt.wrapper import Wrapper

# group entries: which stage is on, and that nothing is to decay this group, whatever the base
STAGE = "metaopt.stage"
UNDECAYED = "metaopt.undecayed"


class Later(Schedule):
    """v(t) = s(t - begin), where s takes the updates from `begin` to `end` for its own."""

    def __init__(self, schedule: Schedule, begin: int, end: int | None) -> None:
        self.schedule, self.begin, self.end = schedule, begin, end
        self.given = {"schedule": schedule, "begin": begin, "end": end}

    def curve(self, run: int | None, span: int | None) -> Curve:
        curve = self.schedule.curve(run, self._left(span))
        return lambda t: curve(max(0.0, t - self.begin))

    def length(self, run: int | None, span: int | None) -> int | None:
        own = self.schedule.length(run, self._left(span))
        return None if own is None else self.begin + own

    def _left(self, span: int | None) -> int | None:
        end = span if self.end is None else self.end
        return None if end is None else end - self.begin

    def __repr__(self) -> str:
        return repr(self.schedule)


@dataclass(frozen=True)
class Stage:
    """What a stack is made of while one base is on; `begin` is the number of updates after which it begins."""

    base: Part
    wrappers: tuple[Wrapper, ...]
    schedules: dict[str, Schedule]
    begin: int


class Stages:
    """The stages of a stack, in order. It is configuration: which one is on is in the groups."""

    def __init__(self, sequence: Part, outer: Sequence[Wrapper], total_steps: int | None, exact: bool) -> None:
        self.total_steps = total_steps
        self.exact = exact
        sequencer: Sequencer = sequence.target(*sequence.arguments.get("members", ()))
        begins = sequencer.begins(total_steps)
        self.stages = tuple(
            _stage(sequence.name, pipeline, outer, begin, end)
            for pipeline, begin, end in zip(sequencer.stages, begins, [*begins[1:], None], strict=True)
        )

    def begin(self, groups: list[Group]) -> tuple[torch.optim.Optimizer, bool]:
        """Return the first base over the groups, and whether its fused kernel was our choice; try the others.

        Raises SpecError or HyperparameterError, also for what a later base would refuse.
        """
        for position, group in enumerate(groups):
            if "lr" in group:
                raise HyperparameterError(
                    f"group {group.get('name', position)} sets lr={group['lr']!r}, but the base changes in this run: "
                    f"use lr_scale, which multiplies the rate of each"
                )
            own = [key for key, value in group.items() if isinstance(as_schedule(value), Schedule)]
            if own:
                raise HyperparameterError(
                    f"group {group.get('name', position)} has a schedule of its own for {own[0]}, but the base changes "
                    f"in this run: give schedules in the stack"
                )
            if group.get(NO_DECAY):
                group[UNDECAYED] = True
        for stage in self.stages[1:]:
            stand_ins = [{"params": _stand_ins(group["params"])} for group in groups]
            base, fused = self._base(stand_ins, stage)
            validate(self._structure(stage, base, fused), base.param_groups)
        base, fused = self._base(groups, self.stages[0])
        for group in base.param_groups:
            group[STAGE] = 0
        return base, fused

    def current(self, groups: Sequence[ParamGroup]) -> int:
        """Return which stage is on."""
        return next((int(group[STAGE]) for group in groups if STAGE in group), 0)

    def follow(self, run: Run) -> None:
        """Change the base if its time is over; back to the first one if the count begins again."""
        current, updates = self.current(run.param_groups), run.updates
        due = max(i for i, stage in enumerate(self.stages) if stage.begin <= updates)
        # never back: a checkpoint of a run that changed its base earlier goes on with what it has
        wanted = max(current, due) if updates else 0
        if wanted != current:
            self._enter(run, wanted)
            run.begin_schedules()

    def prepare_load(self, run: Run, state_dict: Any) -> Callable[[], None]:
        """Have the base of a checkpoint before it is loaded; return what undoes that if the checkpoint is refused."""
        wanted = _saved_stage(state_dict, len(self.stages))
        if wanted is None or wanted == self.current(run.param_groups):
            return lambda: None
        before = {key: vars(run)[key] for key in ("base", "structure", "constructor_state", "constructor_chains")}
        groups, state = run.param_groups, run.state
        entries = [(group, dict(group)) for group in groups]
        kept = {p: dict(held) if isinstance(held, dict) else held for p, held in state.items()}

        def undo() -> None:
            vars(run).update(before)
            for group, own in entries:
                group.clear()
                group.update(own)
            state.clear()
            state.update(kept)
            run.base.param_groups, run.base.state = groups, state
            run.begin_schedules()
            run.invalidate()

        try:
            self._enter(run, wanted)
        except BaseException:
            undo()
            raise
        return undo

    def _base(self, groups: list[Group], stage: Stage) -> tuple[torch.optim.Optimizer, bool]:
        around = stage.wrappers
        return make_base(groups, stage.base, stage.schedules, self.total_steps, around=around, exact=self.exact)

    def _structure(self, stage: Stage, base: torch.optim.Optimizer, fused: bool) -> Structure:
        return Structure(base, stage.wrappers, stage.schedules, self.total_steps, fused)

    def _enter(self, run: Run, number: int) -> None:
        """Let go of the base that is on, make another over the same groups, and go on with the state of wrappers."""
        stage, old = self.stages[number], run.structure.chains[0]
        groups, state = run.param_groups, run.state
        gone = set(old.labelled) - {wrapper.label for wrapper in stage.wrappers}
        for p in list(state):
            _forget(old, state, p, gone)
        names = stage.base.hyperparameters.keys()
        fresh = []
        for group in groups:
            own = {key: group[key] for key in _own_keys(old, group) if key in names}
            fresh.append({"params": list(group["params"]), **own})
        base, fused = self._base(fresh, stage)
        for group, made in zip(groups, base.param_groups, strict=True):
            _refill(group, made, old, gone)
            group[STAGE] = number
            if "lr" in group and "lr" not in stage.schedules:
                group["lr"] = group["lr"] * group.get(LR_SCALE, 1.0)
        run.constructor_state = {p: held for p, held in base.state.items() if isinstance(p, torch.Tensor)}
        run.constructor_chains = {""} if run.constructor_state else set()
        for name in HOOK_TABLES:
            setattr(base, name, getattr(run.base, name))
        base.param_groups, base.state = groups, state
        run.base, run.structure = base, self._structure(stage, base, fused)
        for group in groups:
            if group.get(UNDECAYED):
                _leave_undecayed(run, group)
            complete_group(run, group)
        run.invalidate()


def _stage(where: str, pipeline: Any, outer: Sequence[Wrapper], begin: int, end: int | None) -> Stage:
    base, own = arrange(pipeline)
    if base.is_partition or base.is_sequence:
        raise SpecError(f"{where}: a base that is {base.name} cannot be one of several in turn: give plain bases")
    if begin or end is not None:
        later = {k: Later(v, begin, end) if isinstance(v, Schedule) else v for k, v in base.arguments.items()}
        base = changed(base, arguments=later)
    for wrapper in own:
        if wrapper.takes_means:
            raise SpecError(
                f"{where}: {wrapper.label} takes means over replicas, in cycles that go on when the base changes: "
                f"write it behind the whole"
            )
    before = [w for w in (*outer, *own) if w.runs_before_base()]
    behind = [w for w in (*own, *outer) if not w.runs_before_base()]
    schedules = {k: Later(v, begin, end) for k, v in scheduled(None, own).items()}
    return Stage(base, (*before, *behind), {**scheduled(base, ()), **schedules, **scheduled(None, tuple(outer))}, begin)


def _stand_ins(params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return a small parameter for each kind among some: enough for a constructor to refuse what it does not take."""
    kinds = dict.fromkeys((p.dim(), p.dtype) for p in params)
    return [torch.zeros([1] * dim, dtype=dtype, requires_grad=True) for dim, dtype in kinds]


def _saved_stage(state_dict: Any, number: int) -> int | None:
    groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    first = groups[0] if isinstance(groups, list | tuple) and groups else None
    stage = first.get(STAGE) if isinstance(first, Mapping) else None
    known = isinstance(stage, int) and not isinstance(stage, bool) and 0 <= stage < number
    return stage if known else None


def _own_keys(old: Chain, group: ParamGroup) -> list[str]:
    """Return the settings of the base that a group has of its own: they stay with it."""
    defaults = old.base.defaults
    names = [key for key in defaults if key in group and key not in RUN_FLAGS and key != "lr"]
    return [key for key in names if group[key] is not defaults[key] and group[key] != defaults[key]]


def _forget(old: Chain, state: Any, p: Any, gone: set[str]) -> None:
    """Drop what the base and the wrappers that go have kept of a parameter."""
    if not isinstance(state[p], dict):
        del state[p]
        return
    prefixes = (*(f"{label}." for label in gone), *(f"{key}." for key, _ in old.moment_slots))
    held = state[p]
    for key in [k for k in held if old.is_base_key(k) or (prefixes and str(k).startswith(prefixes))]:
        del held[key]
    if held.keys() - {PLACEHOLDER}:
        held[PLACEHOLDER] = 1.0  # the same keys for every parameter in a checkpoint
    else:
        del state[p]


def _leave_undecayed(run: Run, group: ParamGroup) -> None:
    """Let the decays of wrappers that are new leave a group alone, as those before them did."""
    chain = run.structure.chains[0]
    for key, (wrapper, name) in chain.hyperparameters.items():
        if key not in group and is_decay(wrapper.hyperparameters[name]):
            group[key] = 0.0
            if key in run.structure.schedules:
                known = run.own_schedules[group[OWN_SCHEDULES]] if OWN_SCHEDULES in group else {}
                group.setdefault(OWN_VALUES, dict(known))[key] = None


def _refill(group: ParamGroup, made: ParamGroup, old: Chain, gone: set[str]) -> None:
    """Put the entries of a new base into a group in place of those of the old one."""
    kept = set(_own_keys(old, group))
    for key in [k for k in group if (k in old.base.defaults and k not in kept) or str(k).split(".")[0] in gone]:
        del group[key]
    for key in (LR_FACTOR, BUILT_LR):
        group.pop(key, None)
    group.update({key: value for key, value in made.items() if key not in ("params", "param_names", "name")})
