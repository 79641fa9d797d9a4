"""What a stack was made from, given back as a pipeline with the values that its groups hold now."""

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any

import torch

from metaopt.engine.chain import RUN_FLAGS, ParamGroup
from metaopt.registry import registry
from metaopt.schedule import Schedule
from metaopt.scheduled_values import LR_SCALE
from metaopt.specs.pipeline import Part, Pipeline
from metaopt.stack import Stack


@dataclass(frozen=True)
class Description:
    """The pipeline that a stack was made from; gives it back with the live values of its groups."""

    pipeline: Pipeline
    wrapped: bool = False

    def live(self, stack: Stack) -> Pipeline:
        """Return the pipeline with what the stack's groups hold now, schedules as schedules."""
        parts = [_live(part, stack.param_groups, stack) for part in self.pipeline]
        if self.wrapped:
            name = registry.name_of(type(stack.base))
            base = Part("optimizer", name or type(stack.base).__name__, type(stack.base), registered=name is not None)
            given = _given_to_base(base, stack)
            before = sum(wrapper.runs_before_base() for wrapper in stack.wrappers)
            ordered = sorted(parts, key=lambda p: not p.build_wrapper().runs_before_base())
            parts = [*ordered[:before], changed(base, arguments=given), *ordered[before:]]
        return Pipeline(tuple(parts))

    def text_over(self, base: torch.optim.Optimizer) -> str:
        """Return the pipeline as it was written; of a wrapped optimizer with its class."""
        return f"{self.pipeline!r} around {type(base).__name__}" if self.wrapped else repr(self.pipeline)

    def __repr__(self) -> str:
        return repr(self.pipeline)


def _given_to_base(base: Part, stack: Stack) -> dict[str, Any]:
    """Return what a wrapped optimizer was made with: what its groups share, schedules as schedules, or its defaults."""
    groups = stack.param_groups
    given = {k: groups[0][k] for k in base.hyperparameters if k in groups[0] and k not in RUN_FLAGS}
    shared = _shared_schedules(groups, stack)
    scheduled = {key for group in groups for key in stack.schedules_of(group)}
    for key in given:
        if key in shared:
            given[key] = shared[key]
        elif (key in scheduled or not _same(groups, key)) and key in stack.defaults:
            given[key] = stack.defaults[key]
    return given


def _same(groups: list[ParamGroup], key: str) -> bool:
    return all(g.get(key) is groups[0].get(key) or g.get(key) == groups[0].get(key) for g in groups)


def _live(part: Part, groups: list[ParamGroup], stack: Stack) -> Part:
    """Return a part with the values that all groups hold, otherwise with those that it was written with.

    Each pipeline of a partition gets the values of its own groups; of several bases in turn, the one that is on does.
    """
    if part.is_sequence:
        members = part.arguments["members"]
        on = part.target(*members).stages[groups[0].get("metaopt.stage", 0)]
        live = Pipeline(tuple(_live(p, groups, stack) for p in on))
        return changed(part, arguments={"members": tuple(live if member is on else member for member in members)})
    if part.is_partition:
        return changed(part, arguments={**part.arguments, "parts": _live_parts(part.arguments["parts"], stack)})
    prefix = "" if part.kind == "optimizer" else f"{part.label or part.name.rpartition('.')[2]}."
    group, schedules = groups[0], _shared_schedules(groups, stack)
    given = dict(part.arguments)
    for name, hyperparameter in part.hyperparameters.items():
        key = prefix + name
        if key in schedules:
            given.setdefault(name, schedules[key])
        elif key in group and name not in RUN_FLAGS:
            value = group[key]
            # what differs between groups, and what a group scales or schedules, belongs to the groups
            scheduled = any(key in stack.schedules_of(other) for other in groups)
            if scheduled or not _same(groups, key) or (name == "lr" and not prefix and group[LR_SCALE] != 1.0):
                continue
            if name in given or value != hyperparameter.default:
                given[name] = value
    return changed(part, arguments=given)


def _shared_schedules(groups: list[ParamGroup], stack: Stack) -> dict[str, Schedule]:
    """Return the schedules that drive all groups alike; a group may have its own."""
    first, *others = map(stack.schedules_of, groups)
    return {key: schedule for key, schedule in first.items() if all(o.get(key) == schedule for o in others)}


def _live_parts(parts: Mapping[str, Pipeline], stack: Stack) -> dict[str, Pipeline]:
    own = {chain.name: chain.groups_in(stack.param_groups) for chain in stack.chains}
    return {
        name: Pipeline(tuple(_live(part, own[name], stack) for part in pipeline)) for name, pipeline in parts.items()
    }
