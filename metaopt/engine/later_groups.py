"""Groups that come after construction: what a stack keeps in a group is put there, whoever brought the group."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from metaopt.engine import composition
from metaopt.engine.dividing import Divided
from metaopt.engine.lanes import Entry
from metaopt.errors import ParameterError

if TYPE_CHECKING:
    from metaopt.stack import Stack


def add(stack: "Stack", param_group: Entry) -> None:
    """Add a group to the base and complete it; nothing changes where it is refused."""
    group = _listed(param_group)
    if isinstance(stack.base, Divided):
        group["metaopt.part"] = stack.base.lane_for(group).name
    composition.check_group(stack, group, len(stack.param_groups))
    _name_like_the_others(group, stack.param_groups)
    before = set(stack.state)
    stack.base.add_param_group(group)
    for p in [p for p in stack.state if p not in before]:
        stack.set_aside[p] = stack.state.pop(p)
    group["metaopt.updates"] = stack.param_groups[0]["metaopt.updates"]
    composition.complete(stack, group)


def complete(stack: "Stack") -> list[Entry]:
    """Complete the groups that a client has put here, into `param_groups` or through the base's own methods.

    Returns them.
    """
    groups = stack.base.param_groups
    incomplete = [entry for entry in groups if "metaopt.updates" not in entry]
    count = next((entry["metaopt.updates"] for entry in groups if "metaopt.updates" in entry), 0)
    for position, entry in enumerate(groups):
        if "metaopt.updates" in entry:
            continue
        if isinstance(stack.base, Divided):
            entry["metaopt.part"] = stack.base.lane_for(entry).name
        composition.check_group(stack, entry, position, built=True)
        entry["metaopt.updates"] = count
        composition.complete(stack, entry)
    return incomplete


def _listed(group: Entry) -> Entry:
    """Return a copy of a group with its members, which may come from a generator, in a list."""
    if not isinstance(group, dict) or "params" not in group:
        raise ParameterError(f"add_param_group: a group is a dict with the key 'params', not {group!r:.60}")
    members = group["params"]
    if isinstance(members, set):  # torch refuses it: its order is no order
        return dict(group)
    return {**group, "params": [members] if isinstance(members, torch.Tensor) else list(members)}


def _name_like_the_others(group: Entry, others: Sequence[Entry]) -> None:
    """Give the members of a group names where those of the others have some: torch wants names for all or for none.

    Whoever builds a stack from a model has given no names, and adds a group without.
    """
    unnamed = "param_names" not in group and not any(isinstance(member, tuple) for member in group["params"])
    if unnamed and any("param_names" in other for other in others):
        called = group.get("name", f"group {len(others)}")
        group["param_names"] = [f"{called}.{position}" for position in range(len(group["params"]))]
