"""Several bases in one stack, side by side or one after another: which updates what, and all as one optimizer."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain as joined
from typing import Any

import torch

from metaopt.engine.chain import PART, Chain, ParamGroup
from metaopt.errors import ParameterError, did_you_mean


class Partitioner(ABC):
    """Assigns a model's parameters to several pipelines: an optimizer made of others.

    A subclass is registered as an optimizer. `parts` maps the name of each part to its pipeline; every parameter
    goes to the part that `branch_of` names.
    """

    def __init__(self, parts: Mapping[str, Any]) -> None:
        if not isinstance(parts, Mapping) or not parts:
            raise ParameterError(f"{type(self).__name__.lower()} takes a dict of pipelines by name, not {parts!r:.60}")
        self.parts = dict(parts)

    @abstractmethod
    def branch_of(self, name: str, parameter: torch.Tensor) -> str | None:
        """Return the name of the part that updates this parameter, or None if there is none."""


class Sequencer(ABC):
    """Has one pipeline after the other as the base of a stack: an optimizer made of others, one of which is on.

    A subclass is registered as an optimizer. `stages` are the pipelines in order; its constructor takes pipelines and
    numbers by position.
    """

    stages: tuple[Any, ...]

    @abstractmethod
    def begins(self, run: int | None) -> list[int]:
        """Return after how many updates each stage begins, in a run of `run` updates if that is known; the first is 0.

        Raises SpecError.
        """


class MultiBase(torch.optim.Optimizer):
    """Several bases as one: each updates the groups that carry its name under `metaopt.part`."""

    def __init__(self, chains: Sequence[Chain], partitioner: Partitioner) -> None:
        self.chains = tuple(chains)
        self.partitioner = partitioner
        state = defaultdict(dict, joined.from_iterable(chain.base.state.items() for chain in chains))
        super().__init__([group for chain in chains for group in chain.base.param_groups], {})
        first, *others = (chain.base.defaults for chain in chains)
        # a key that one base alone has would reach the groups of the others
        self.defaults = {k: v for k, v in first.items() if all(k in other for other in others)}
        self.state = state
        self.assign_groups()

    def assign_groups(self) -> None:
        """Give each base its sub-list of the groups and the common state: clients rebind both."""
        for chain in self.chains:
            chain.base.param_groups = [group for group in self.param_groups if chain.has_group(group)]
            chain.base.state = self.state

    def step(self, closure: Any = None) -> Any:
        """Let each base make its update."""
        loss = None if closure is None else closure()
        self.assign_groups()
        for chain in self.chains:
            chain.step()
        return loss

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group to the part that `metaopt.part` or the parameters' names say. Raises ParameterError."""
        if any(param_group is own for chain in self.chains for own in chain.base.param_groups):
            super().add_param_group(param_group)  # at construction
            return
        chain = self.chain_for(param_group)
        members = param_group["params"]
        for member in [members] if isinstance(members, torch.Tensor) else list(members):
            member = member[1] if isinstance(member, tuple) else member
            if any(member is own for group in self.param_groups for own in group["params"]):
                raise ParameterError("a parameter of the new group is in another group already")
        self.assign_groups()
        chain.base.add_param_group(param_group)
        param_group[PART] = chain.name
        self.param_groups.append(chain.base.param_groups[-1])

    def chain_for(self, group: ParamGroup) -> Chain:
        """Return the chain that a new group belongs to, by its `metaopt.part` or its names. Raises ParameterError."""
        named = {chain.name: chain for chain in self.chains}
        part = group.get(PART)
        if part is not None:
            if part not in named:
                raise ParameterError(
                    f"metaopt.part must be a part of this stack ({', '.join(map(repr, named))}), got {part!r}."
                    f"{did_you_mean(str(part), named)}"
                )
            return named[part]
        pairs = list(zip(group.get("param_names", ()), group["params"], strict=False)) or [
            member for member in group["params"] if isinstance(member, tuple)
        ]
        parts = {self.partitioner.branch_of(name, p) for name, p in pairs}
        if len(parts) != 1 or None in parts:
            raise ParameterError(
                f"a group added to a stack of several parts needs metaopt.part (one of {', '.join(map(repr, named))}), "
                f"or (name, parameter) pairs whose names all match one part"
            )
        return named[parts.pop() or ""]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let each base load what belongs to it, group by group in the order of the live groups."""
        self.assign_groups()
        parts = [group[PART] for group in self.param_groups]
        state: defaultdict[torch.Tensor, Any] = defaultdict(dict)
        loaded = {}
        for chain in self.chains:
            groups = [g for part, g in zip(parts, state_dict["param_groups"], strict=True) if part == chain.name]
            ids = {i for group in groups for i in group["params"]}
            param_states = {i: value for i, value in state_dict["state"].items() if i in ids}
            chain.base.load_state_dict({"state": param_states, "param_groups": groups})
            state.update(chain.base.state)
            loaded[chain.name] = iter(chain.base.param_groups)
        self.param_groups = [next(loaded[part]) for part in parts]
        for part, group in zip(parts, self.param_groups, strict=True):
            group[PART] = part
        self.state = state
        self.assign_groups()
