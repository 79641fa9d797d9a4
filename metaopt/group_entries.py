"""What users and clients write into parameter groups, read once when a group enters a run."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch

from metaopt.errors import HyperparameterError, ParameterError
from metaopt.hyperparameters import Hyperparameter
from metaopt.schedule import Schedule, as_schedule, validate_value, validate_values
from metaopt.space import find_spaces

ParamGroup = dict[str, Any]

# taken out when the engine completes a group: nothing in the stack decays it; the other names of tied parameters, for
# parts that choose by name; its own schedules by key, None for a constant beside a schedule of the stack
NO_DECAY = "metaopt.no_decay"
TIED = "metaopt.tied"
OWN_VALUES = "metaopt.own_values"


def take_value(
    group: ParamGroup,
    key: str,
    hyperparameter: Hyperparameter | None,
    *,
    where: str,
    shared: Schedule | None,
    total_steps: int | None,
    updates: int | None = None,
) -> None:
    """Validate an entry that a user has given a group, beside the stack's schedule for the same key, if there is one.

    A schedule drives the entry of this group only, and a constant stays; but a constant rate of a group that comes
    after `updates` updates is the schedule's rate in that proportion. Raises HyperparameterError.
    """
    given = group[key]
    if any(find_spaces(given, key)):
        raise HyperparameterError(
            f"{where} sets {key}={given!r:.80}: a group takes a value; a search space belongs into the spec, for which "
            f"metaopt tune chooses one"
        )
    value = as_schedule(given) if hyperparameter is None else validate_value(hyperparameter, given, where)
    scheduled = isinstance(value, Schedule)
    if hyperparameter is not None and not hyperparameter.per_group and (scheduled or shared is not None):
        raise HyperparameterError(f"{where} sets {key}={given!r}, which all groups share: give it in the stack")
    if isinstance(value, Schedule):
        if hyperparameter is not None:
            validate_values(value, hyperparameter, where, total_steps)
        group.setdefault(OWN_VALUES, {})[key] = value
        group[key] = value.curve(total_steps, total_steps)(0)
        return
    group[key] = value
    if shared is None:
        return
    if key != "lr":
        group.setdefault(OWN_VALUES, {})[key] = None
        return
    now = 0.0 if updates is None else shared.curve(total_steps, total_steps)(updates)
    if not now:
        reason = "" if updates is None else ", whose rate is 0 now, so that there is no proportion"
        raise HyperparameterError(
            f"{where} sets lr={given!r}, but the stack has a schedule for it{reason}: "
            f"give lr_scale to follow the schedule in a proportion, or lr=constant({given!r}) for a rate of its own"
        )
    group["lr_scale"] = group.get("lr_scale", 1.0) * (float(value) / now)


def mark_no_decay(group: ParamGroup) -> None:
    """Let a decay of zero that a user has given a group be that of every part that decays weights."""
    if not isinstance(group.get("weight_decay"), bool | Schedule) and group.get("weight_decay") == 0:
        group[NO_DECAY] = True


def is_decay(hyperparameter: Hyperparameter) -> bool:
    """Return whether a wrapper's hyperparameter is a decay of the weights, which a group may switch off."""
    return hyperparameter.name.startswith("weight_decay") and hyperparameter.per_group


def lr_scale_of(group: ParamGroup) -> float:
    """Return the factor of the learning rate that a group was given. Raises HyperparameterError."""
    value = group.get("lr_scale", 1.0)
    number = not isinstance(value, bool) and isinstance(value, Real | torch.Tensor)
    if not number or not 0.0 <= float(value) < float("inf"):
        where = f"group {group['name']}" if "name" in group else "a group"
        raise HyperparameterError(f"{where} sets lr_scale={value!r:.60}: it multiplies the rate, give a number >= 0")
    return float(value)


def with_list(group: ParamGroup) -> ParamGroup:
    """Return a copy of a group with its parameters, which may come from a generator, in a list."""
    if not isinstance(group, dict) or "params" not in group:
        raise ParameterError(f"add_param_group: a group must be a dict with the key 'params', got {group!r:.60}")
    members = group["params"]
    if isinstance(members, set):  # torch refuses sets, because they are unordered
        return dict(group)
    return {**group, "params": [members] if isinstance(members, torch.Tensor) else list(members)}


def name_like_others(group: ParamGroup, others: Sequence[ParamGroup]) -> None:
    """Name a new group's parameters if existing groups have names; torch requires all or none."""
    unnamed = "param_names" not in group and not any(isinstance(member, tuple) for member in group["params"])
    if unnamed and any("param_names" in other for other in others):
        called = group.get("name", f"group {len(others)}")
        group["param_names"] = [f"{called}.{position}" for position in range(len(group["params"]))]


def rate_of(group: dict[str, Any]) -> float | None:
    """Return the learning rate of a group as a number, what it was before a torch scheduler; None if it has none."""
    rate = group.get("initial_lr", group.get("lr"))
    if isinstance(rate, torch.Tensor):
        return None if rate.is_meta else float(rate)
    return float(rate) if isinstance(rate, Real) else None
