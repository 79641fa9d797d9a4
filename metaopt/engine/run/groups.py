"""How groups join a run: their entries are validated against bounds, settings are read, and what is missing is added.

Changes the groups, the schedules that follow them, and what the run remembers of both.
"""

import weakref
from collections.abc import Collection, Sequence

import torch

from metaopt.distributed.shards import is_sharded
from metaopt.engine.chain import MOST_NUMBERS, PART, Chain, ParamGroup, number_of
from metaopt.engine.run.entries import (
    AVERAGE_SHOWN,
    BUILT_LR,
    FORMAT,
    FORMAT_KEY,
    LABELS,
    OWN_SCHEDULES,
    STEP_CALLS,
    TEMPLATE,
    TOTAL_STEPS,
    UPDATES,
)
from metaopt.engine.run.run import Run
from metaopt.errors import HyperparameterError, StepError, did_you_mean
from metaopt.group_entries import (
    NO_DECAY,
    OWN_VALUES,
    TIED,
    is_decay,
    lr_scale_of,
    mark_no_decay,
    name_like_others,
    rate_of,
    take_value,
    with_list,
)
from metaopt.hyperparameters import from_signature
from metaopt.schedule import Schedule, as_schedule
from metaopt.scheduled_values import LR_SCALE
from metaopt.slots import Scalar
from metaopt.space import find_spaces
from metaopt.wrapper import Wrapper


def complete_groups(run: Run) -> None:
    """Validate and complete the groups that the base was built with."""
    for position, group in enumerate(run.param_groups):
        # what it holds of the base's may be defaults: what the user gave was read before
        validate_group(run, group, position, {key for key in group if "." in key})
        complete_group(run, group)
    know_members(run)
    run.begin_schedules()


def adopt_groups(run: Run) -> None:
    """Complete the groups that a client has put into `param_groups`, or added through the base's own methods."""
    groups, (adopted, number) = run.param_groups, run.adopted
    if groups is adopted and len(groups) == number:
        return
    if groups is adopted:
        run.adopt_rates()
    new = any(UPDATES not in group for group in groups)
    count = next((group[UPDATES] for group in groups if UPDATES in group), 0)
    for position, group in enumerate(groups):
        if UPDATES in group:
            continue
        if run.structure.multi_base is not None:
            group[PART] = run.structure.multi_base.chain_for(group).name
        shared, defaults = run.structure.shared_schedules_of(group), run.structure.chain_of(group).base.defaults
        given = {k for k in group if "." in k or (k in shared and group[k] != defaults.get(k))}
        validate_group(run, group, position, given)
        group[UPDATES] = count
        complete_group(run, group)
    _separate_scalars(run)
    know_members(run)
    if new or len(groups) != len(run.scheduled):
        run.begin_schedules()
    run.invalidate()
    run.adopted = groups, len(groups)


def add_group(run: Run, param_group: ParamGroup) -> None:
    """Add a group to the base and complete it; nothing changes if it is refused."""
    group = with_list(param_group)
    run.adopt_rates()
    if run.structure.multi_base is not None:
        group[PART] = run.structure.multi_base.chain_for(group).name
    mark_no_decay(group)
    validate_group(run, group, len(run.param_groups), group.keys())
    name_like_others(group, run.param_groups)
    before = set(run.state)
    run.base.add_param_group(group)
    try:
        for p in [p for p in run.state if p not in before]:
            run.constructor_state[p] = run.state.pop(p)
        group[UPDATES] = run.updates
        complete_group(run, group)
        know_members(run)
        run.begin_schedules()  # one of its own may have no value at this count
    except BaseException:
        del run.param_groups[-1]
        if run.structure.multi_base is not None:
            run.structure.multi_base.assign_groups()
        raise
    run.invalidate()


def validate_group(run: Run, group: ParamGroup, position: int, given: Collection[str]) -> None:
    """Raise HyperparameterError for an entry that no part has, or that is out of bounds.

    `given` are the entries that the user has set, not the base's defaults; they are read here (see `take_value`).
    """
    structure = run.structure
    others = [other for other in run.param_groups if other is not group]
    has_begun = run.param_groups and UPDATES in run.param_groups[0]
    updates = run.updates if has_begun else None
    where = f"group {group.get('name', position)}"
    chain = structure.chain_of(group)
    schedules, known = structure.shared_schedules_of(group), chain.hyperparameters
    if group.get("differentiable") and chain.ordered:
        raise HyperparameterError(
            f"{where}: differentiable=True: {chain.ordered[0].label} changes tensors in place and cannot be "
            f"differentiated through; leave one of the two out"
        )
    scale, defaults = lr_scale_of(group), chain.base.defaults
    if scale != 1.0 and "lr" not in schedules and group.get("lr", defaults.get("lr")) is None:
        raise HyperparameterError(
            f"lr_scale={scale:g}: {type(run.base).__name__} works its learning rate out itself, so that there is "
            f"nothing to scale; give it an lr, or leave lr_scale out"
        )
    if defaults.get("weight_decay"):
        mark_no_decay(group)
    for key in known if group.get(NO_DECAY) else ():
        if is_decay(known[key][0].hyperparameters[known[key][1]]):
            group.setdefault(key, 0.0)
            given = {*given, key}
    for key, value in list(group.items()):
        place, declared = where, None
        if key in known:
            wrapper, name = known[key]
            place, declared = f"{where}, {wrapper.label}", wrapper.hyperparameters[name]
            is_set = key in given
        elif "." in key and not key.startswith("metaopt."):
            raise HyperparameterError(f"{where}: no part of this stack has {key!r}.{did_you_mean(key, known)}")
        else:
            # the base validates its constants itself
            is_set = key in chain.base.defaults and (
                (key in given and key in schedules)
                or isinstance(as_schedule(value), Schedule)
                or any(find_spaces(value, key))
            )
            declared = from_signature(type(chain.base)).get(key) if is_set else None
        if is_set:
            shared, total = schedules.get(key), structure.total_steps
            take_value(group, key, declared, where=place, shared=shared, total_steps=total, updates=updates)
        if key in known and declared is not None and not declared.per_group:
            _validate_shared(group, key, *known[key], where, others)


def _validate_shared(
    group: ParamGroup, key: str, wrapper: Wrapper, name: str, where: str, others: Sequence[ParamGroup]
) -> None:
    # before the first group is complete the wrapper's own value is what the others will get
    values = [other.get(key, getattr(wrapper, name)) for other in others] or [group[key]]
    if any(value != group[key] for value in values):
        raise HyperparameterError(
            f"{where} sets {key}={group[key]!r}, but {wrapper.label} acts on all groups at once, where it is "
            f"{values[0]!r}: give it in the stack, for all"
        )


def complete_group(run: Run, group: ParamGroup) -> None:
    """Give a group the entries that wrappers and engine keep in it, and apply its `lr_scale` once."""
    chain = run.structure.chain_of(group)
    group.setdefault(UPDATES, 0)
    group[FORMAT_KEY] = FORMAT
    if run.structure.exchanges:
        group.setdefault(STEP_CALLS, next((g[STEP_CALLS] for g in run.param_groups if STEP_CALLS in g), 0))
    group.setdefault(TOTAL_STEPS, run.structure.total_steps)
    group.setdefault(AVERAGE_SHOWN, "")
    group.setdefault(TEMPLATE, "")
    if OWN_VALUES in group:
        run.own_schedules.append(group.pop(OWN_VALUES))
        group[OWN_SCHEDULES] = len(run.own_schedules) - 1
    scale = lr_scale_of(group)
    group.pop("lr_scale", None)
    if LR_SCALE not in group:
        group[LR_SCALE] = scale
        if scale != 1.0 and "lr" not in run.schedules_of(group):
            group["lr"] = group["lr"] * scale
    group.setdefault(BUILT_LR, None if "lr" in run.schedules_of(group) else rate_of(group))
    group.pop(NO_DECAY, None)
    group.pop(TIED, None)
    group[LABELS] = ",".join(chain.labelled)
    for key, (wrapper, name) in chain.hyperparameters.items():
        value = getattr(wrapper, name)
        group.setdefault(key, 0.0 if isinstance(value, Schedule) else value)
    for key, initial in chain.counters.items():
        # a group that comes later joins the others' count
        group.setdefault(key, next((g[key] for g in run.param_groups if key in g), initial))
    place_scalars(run, group, chain)


def place_scalars(run: Run, group: ParamGroup, chain: Chain) -> None:
    """Give a group the scalars of its wrappers, beside its parameters; those of the whole run are one tensor."""
    device = group["params"][0].device if group["params"] else torch.device("cpu")
    for key, (wrapper, scalar) in chain.scalars.items():
        shared = None
        if scalar.per == "run":
            peers = run.param_groups if wrapper in chain.outer else chain.groups_in(run.param_groups)
            shared = next((g[key] for g in peers if g is not group and key in g), None)
        if shared is not None:
            group[key] = shared
        elif key in group:
            group[key] = group[key].to(device=device)
        else:
            wide = any(p.dtype in (torch.float64, torch.complex128) for p in group["params"])
            group[key] = _new_scalar(scalar, wrapper, torch.float64 if wide else torch.float32, device)


def _separate_scalars(run: Run) -> None:
    """Give each group scalars of its own if a client has split a group: copies of its entries hold one tensor."""
    held: set[int] = set()
    for group in run.param_groups:
        for key, (_, scalar) in run.structure.chain_of(group).scalars.items():
            if scalar.per != "run" and id(group[key]) in held:
                group[key] = group[key].clone()
            held.add(id(group[key]))


def _new_scalar(scalar: Scalar, wrapper: Wrapper, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    size = () if scalar.size is None else (number_of(scalar.size, wrapper, MOST_NUMBERS),)
    return torch.full(size, scalar.initial, dtype=dtype, device=device)


def validate_members(run: Run, group: ParamGroup) -> None:
    """Refuse a group whose parameters a client has replaced by another number; names may be out of date."""
    names, members = group.get("param_names"), group["params"]
    if names is not None and len(names) != len(members) and not all(map(run.knows, members)):
        raise StepError(
            f"a group of {len(names)} parameters ({', '.join(names[:3])}, ...) holds {len(members)} now: a client "
            f"has put others in their places. DeepSpeed's ZeRO does so: a rank gets a flat share, of which norms, "
            f"shapes and names are not the model's. Shard with FSDP2 (fully_shard) instead"
        )


def know_members(run: Run) -> None:
    """Remember which parameters the groups hold (see `validate_members`), and measure if some are sharded.

    What is measured over shards is measured by all ranks together, whichever of them has a log or asks for values.
    """
    for group in run.param_groups:
        params = group["params"]
        # one parameter of each class: there may be thousands
        if any(map(is_sharded, dict(zip(map(type, params), params, strict=True)).values())):
            run.metrics.ask()
        run.known_params.update(zip(map(id, params), map(weakref.ref, params), strict=True))
