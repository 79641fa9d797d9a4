"""Several bases in one stack: who updates which parameters, and the bases as one optimizer."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from metaopt.engine.lanes import Lane
from metaopt.errors import CheckpointError, ParameterError, did_you_mean
from metaopt.wrapper import Closure

if TYPE_CHECKING:
    from metaopt.stack import Stack

Entry = dict[str, Any]


class Partitioner(ABC):
    """Deals a model's parameters out to several pipelines: an optimizer made of others.

    A subclass is registered as an optimizer. `parts` maps the name of each part to its pipeline; every parameter
    goes to the part that `branch_of` names.
    """

    def __init__(self, parts: Mapping[str, Any]) -> None:
        if not isinstance(parts, Mapping) or not parts:
            raise ParameterError(f"{type(self).__name__.lower()} takes a dict of pipelines by name, not {parts!r:.60}")
        self.parts = dict(parts)

    @abstractmethod
    def branch_of(self, name: str, parameter: torch.Tensor) -> str | None:
        """Return the name of the part that updates this parameter, or None where there is none."""


class Divided(torch.optim.Optimizer):
    """Several bases as one: each updates the groups that carry its name under `metaopt.part`."""

    def __init__(self, lanes: Sequence[Lane], division: Partitioner) -> None:
        self.lanes = tuple(lanes)
        self.division = division
        state = defaultdict(dict, chain.from_iterable(lane.base.state.items() for lane in lanes))
        super().__init__([entry for lane in lanes for entry in lane.base.param_groups], {})
        first, *others = (lane.base.defaults for lane in lanes)
        # a key that one base alone has would reach the groups of the others
        self.defaults = {k: v for k, v in first.items() if all(k in other for other in others)}
        self.state = state
        self.deal()

    def deal(self) -> None:
        """Give each base its sub-list of the groups and the common state: clients rebind both."""
        for lane in self.lanes:
            lane.base.param_groups = [entry for entry in self.param_groups if lane.holds(entry)]
            lane.base.state = self.state

    def step(self, closure: Any = None) -> Any:
        """Let each base make its update."""
        loss = None if closure is None else closure()
        self.deal()
        for lane in self.lanes:
            lane.step()
        return loss

    def add_param_group(self, param_group: Entry) -> None:
        """Add a group to the part that `metaopt.part` or the parameters' names say. Raises ParameterError."""
        if any(param_group is own for lane in self.lanes for own in lane.base.param_groups):
            super().add_param_group(param_group)  # at construction
            return
        lane = self.lane_for(param_group)
        members = param_group["params"]
        for member in [members] if isinstance(members, torch.Tensor) else list(members):
            member = member[1] if isinstance(member, tuple) else member
            if any(member is own for entry in self.param_groups for own in entry["params"]):
                raise ParameterError("a parameter of the new group stands in another group already")
        self.deal()
        lane.base.add_param_group(param_group)
        param_group["metaopt.part"] = lane.name
        self.param_groups.append(lane.base.param_groups[-1])

    def lane_for(self, group: Entry) -> Lane:
        """Return the lane that a new group belongs to, by its `metaopt.part` or its names. Raises ParameterError."""
        named = {lane.name: lane for lane in self.lanes}
        part = group.get("metaopt.part")
        if part is not None:
            if part not in named:
                raise ParameterError(
                    f"metaopt.part={part!r} is no part of this stack.{did_you_mean(str(part), named)} "
                    f"Its parts: {', '.join(map(repr, named))}"
                )
            return named[part]
        pairs = list(zip(group.get("param_names", ()), group["params"], strict=False)) or [
            member for member in group["params"] if isinstance(member, tuple)
        ]
        parts = {self.division.branch_of(name, p) for name, p in pairs}
        if len(parts) != 1 or None in parts:
            raise ParameterError(
                f"a group added to a stack of several parts needs metaopt.part (one of {', '.join(map(repr, named))}), "
                f"or (name, parameter) pairs whose names all match one part"
            )
        return named[parts.pop() or ""]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let each base load what belongs to it, group by group in the order of the live groups."""
        self.deal()
        parts = [entry["metaopt.part"] for entry in self.param_groups]
        for part, saved in zip(parts, state_dict["param_groups"], strict=True):
            if saved.get("metaopt.part", part) != part:
                raise CheckpointError(
                    f"the checkpoint's part {saved['metaopt.part']!r} stands where this stack has {part!r}: "
                    f"build the stack with the same parts in the same order"
                )
        state: defaultdict[torch.Tensor, Any] = defaultdict(dict)
        loaded = {}
        for lane in self.lanes:
            groups = [g for part, g in zip(parts, state_dict["param_groups"], strict=True) if part == lane.name]
            ids = {i for group in groups for i in group["params"]}
            held = {i: value for i, value in state_dict["state"].items() if i in ids}
            lane.base.load_state_dict({"state": held, "param_groups": groups})
            state.update(lane.base.state)
            loaded[lane.name] = iter(lane.base.param_groups)
        self.param_groups = [next(loaded[part]) for part in parts]
        for part, entry in zip(parts, self.param_groups, strict=True):
            entry["metaopt.part"] = part
        self.state = state
        self.deal()


def step_bases(stack: "Stack", *closure: Closure) -> None:
    """Call each base's own step, without the hooks that torch put around it: the stack fires those."""
    if len(stack.lanes) > 1 or stack.lanes[0].name:
        assert isinstance(stack.base, Divided)
        stack.base.deal()
        # the loss is evaluated by now, for all of them
        closure = ()
    for lane in stack.lanes:
        lane.step(*closure)
