"""What is wrong with a checkpoint, found before anything of it is applied (law 1)."""

from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from metaopt.engine.composition import RUN_FLAGS
from metaopt.engine.lanes import Entry, Lane
from metaopt.engine.stand_in import state_after_one_update
from metaopt.errors import CheckpointError

if TYPE_CHECKING:
    from metaopt.stack import Stack


def check_form(state_dict: Any) -> None:
    """Raise CheckpointError for what is no optimizer's state dict."""
    form = "an optimizer's state dict has 'state', a dict, and 'param_groups', a list of dicts with 'params'"
    for key in ("state", "param_groups"):
        if not isinstance(state_dict, Mapping) or key not in state_dict:
            raise CheckpointError(f"the checkpoint has no {key!r}: {form}")
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"the checkpoint's 'state' is a {type(state).__name__}: {form}")
    if not isinstance(groups, list | tuple):
        raise CheckpointError(f"the checkpoint's 'param_groups' is a {type(groups).__name__}: {form}")
    for position, group in enumerate(groups):
        if not isinstance(group, Mapping) or "params" not in group:
            raise CheckpointError(f"the checkpoint's group {position} has no 'params': {form}")


def check_fit(stack: "Stack", groups: list[Entry], state: Mapping[Any, Any]) -> None:
    """Raise CheckpointError for the checkpoint of another model, another base or another run."""
    live = stack.param_groups
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in live]:
        raise CheckpointError(
            f"the checkpoint has groups of {[len(g['params']) for g in groups]} parameters, this stack of "
            f"{[len(g['params']) for g in live]}: build the stack over the same model and groups"
        )
    for position, (group, entry) in enumerate(zip(groups, live, strict=True)):
        _check_base_keys(stack.lane_of(entry), group, entry, position)
        _check_total_steps(group.get("metaopt.total_steps"), entry["metaopt.total_steps"])
    _check_counts(stack, groups)
    _check_swapped(stack, groups)
    ids = chain.from_iterable(g["params"] for g in groups)
    owners = ((p, stack.lane_of(entry)) for entry in live for p in entry["params"])
    for i, (p, lane) in zip(ids, owners, strict=True):
        held = state.get(i, {})
        # under names some bases keep numbers of the whole run
        if not isinstance(held, Mapping) and not isinstance(i, str):
            raise CheckpointError(f"the checkpoint's state of parameter {i} is a {type(held).__name__}, not a dict")
        _check_entries(stack, lane, i, p, held)


def _check_base_keys(lane: Lane, group: Entry, entry: Entry, position: int) -> None:
    saved = {k for k in group if "." not in k} - RUN_FLAGS - {"params", "param_names", "name"}
    # heavyball keeps what no checkpoint should hold under names that begin so
    own = {k for k in lane.base.defaults if not k.startswith("_")} - RUN_FLAGS
    missing, unknown = own - saved, saved - own - set(entry)
    # one side alone is an older torch or a scheduler's note; both are another optimizer
    if missing and unknown:
        raise CheckpointError(
            f"the checkpoint belongs to another base than {type(lane.base).__name__}: its group {position} has "
            f"{', '.join(sorted(unknown))} and lacks {', '.join(sorted(missing))}"
        )


def _check_total_steps(saved: Any, own: int | None) -> None:
    if saved is not None and own is not None and saved != own:
        raise CheckpointError(
            f"the checkpoint's run has total_steps={saved}, this stack total_steps={own}: "
            f"schedules would not continue where they stopped; build the stack with total_steps={saved}"
        )


def _check_counts(stack: "Stack", groups: list[Entry]) -> None:
    keys = ["metaopt.updates", *dict.fromkeys(key for lane in stack.lanes for key in lane.counter_keys)]
    for key in keys:
        counts = [group[key] for group in groups if key in group]
        if any(isinstance(count, bool) or not isinstance(count, int) or count < 0 for count in counts):
            raise CheckpointError(f"the checkpoint's {key} is {counts[0]!r}: it counts, from 0 up")
        if len(set(counts)) > 1:
            raise CheckpointError(
                f"the checkpoint's groups have different {key}, {', '.join(map(str, counts))}: a run has one count; "
                f"the checkpoint was put together from several"
            )


def _check_swapped(stack: "Stack", groups: list[Entry]) -> None:
    label = groups[0].get("metaopt.swapped")
    keeping = {w.label for lane in stack.lanes for w in lane.chain if "averaged" in w.implemented_hooks()}
    if label and label not in keeping:
        raise CheckpointError(
            f"the checkpoint was taken inside averaged({label!r}), whose weights stand in the model's place, and this "
            f"stack has no {label!r} to swap them back: load it into a stack that has, or save outside the context"
        )


def _check_entries(stack: "Stack", lane: Lane, i: Any, p: torch.Tensor, held: Mapping[str, Any]) -> None:
    slots = {key: slot for key, _, slot in lane.slots if slot.kind != "moments"}
    live = stack.state.get(p) or stack.set_aside.get(p) or {}
    suspect: dict[Any, torch.Tensor] = {}
    for key, value in held.items():
        if key in slots and not isinstance(value, torch.Tensor):
            raise CheckpointError(f"the checkpoint's {key} of parameter {i} is a {type(value).__name__}, not a tensor")
        if not isinstance(value, torch.Tensor):
            continue
        expected = live.get(key)
        if isinstance(expected, torch.Tensor) and expected.shape == value.shape:
            continue
        if key in slots and value.shape != p.shape:
            raise _of_another_model(key, value, i, p)
        if key not in slots and _is_foreign(value, p):
            suspect[key] = value
    if suspect:
        fits = any(isinstance(value, torch.Tensor) and value.shape == p.shape for value in held.values())
        _ask_base(stack, lane, i, p, suspect, another_fits=fits)


def _ask_base(
    stack: "Stack", lane: Lane, i: Any, p: torch.Tensor, suspect: Mapping[Any, torch.Tensor], *, another_fits: bool
) -> None:
    """Raise where the base would not keep such tensors: it may keep what it likes, such as a matrix per dimension."""
    kept = state_after_one_update(lane, stack.entry_of(p), p)
    # one shape for all is what moments have: they are taken for those of another model where the base cannot tell
    foreign = not kept and not another_fits and len({value.shape for value in suspect.values()}) == 1
    for key, value in suspect.items():
        own = kept.get(key)
        # beside entries that fit, others than moments may have grown since their first update
        if isinstance(own, torch.Tensor) and (own.shape == p.shape or not another_fits):
            foreign = foreign or own.shape != value.shape
        if foreign:
            raise _of_another_model(key, value, i, p)


def _of_another_model(key: Any, value: torch.Tensor, i: Any, p: torch.Tensor) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint's {key} of parameter {i} has shape {tuple(value.shape)}, "
        f"the parameter has {tuple(p.shape)}: it belongs to another model"
    )


def _is_foreign(value: torch.Tensor, p: torch.Tensor) -> bool:
    """Tell whether a base's tensor cannot belong to a parameter of this shape, whatever the base keeps."""
    if value.dim() == 0:
        return False
    if value.dim() == p.dim():
        return any(a not in (b, 1) for a, b in zip(value.shape, p.shape, strict=True))
    return value.numel() == p.numel() > 1 or (p.dim() == 0 and value.numel() > 1)
