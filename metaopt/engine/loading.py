"""Loading a checkpoint, whole or not at all (law 1)."""

import copy
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from metaopt.engine import screening
from metaopt.engine.composition import RUN_FLAGS
from metaopt.engine.first_update import slot_dtype
from metaopt.engine.handing_over import of_users, own_hooks_alone
from metaopt.engine.stand_in import restore_dtypes
from metaopt.errors import CheckpointError, HyperparameterError
from metaopt.wrapper import Wrapper

if TYPE_CHECKING:
    from metaopt.stack import Stack


@dataclass
class LoadReport:
    """What came of a `load_state_dict`: labels taken from the checkpoint, started fresh, and dropped.

    `kept` names what decides which state there is, where the checkpoint had another value than the live stack.
    """

    taken: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = (
            ("taken", self.taken),
            ("started fresh", self.fresh),
            ("dropped", self.dropped),
            ("kept as this stack has it", self.kept),
        )
        return "; ".join(f"{what}: {', '.join(labels)}" for what, labels in parts if labels)


def load(stack: "Stack", state_dict: dict[str, Any]) -> None:
    """Load into the base through its own `load_state_dict`, then give every part its entries back, uncast."""
    state_dict = dict(state_dict)
    for hook in of_users(stack._optimizer_load_state_dict_pre_hooks, stack.base):
        state_dict = hook(stack, state_dict) or state_dict
    screening.check_form(state_dict)
    saved_groups = copy.deepcopy(list(state_dict["param_groups"]))
    saved_state: dict[Any, Any] = state_dict["state"]
    screening.check_fit(stack, saved_groups, saved_state)
    report = _report(stack, saved_groups)
    groups = _merge_groups(stack, saved_groups, report)
    base_state = _base_state(saved_state, tuple(f"{label}." for label in (*_labels(stack), *report.dropped)))
    live = stack.base.state, stack.base.param_groups
    try:
        with own_hooks_alone(stack.base):
            stack.base.load_state_dict({**_extras(state_dict), "state": base_state, "param_groups": groups})
        restore_dtypes(stack, groups, base_state)
        _restore_wrapper_state(stack, groups, saved_state)
    except BaseException:
        stack.base.state, stack.base.param_groups = live
        raise
    for p in stack.state:  # what the constructor made of these will not be needed
        stack.set_aside.pop(p, None)
    stack.load_report = report


def warn(stack: "Stack") -> None:
    """Warn of what started fresh or was dropped: last, for a warning may be made an error."""
    report = stack.load_report
    if report is not None and (report.fresh or report.dropped or report.kept):
        warnings.warn(f"loaded a checkpoint of another stack; {report}", UserWarning, stacklevel=3)


def _extras(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return what a base wrote beside state and groups, without bytes: a base might unpickle them (law 4)."""
    return {key: _without_bytes(value) for key, value in state_dict.items() if key not in ("state", "param_groups")}


def _without_bytes(value: Any) -> Any:
    if not isinstance(value, dict):
        return copy.copy(value)
    return {key: _without_bytes(held) for key, held in value.items() if not isinstance(held, bytes | bytearray)}


def _labels(stack: "Stack") -> list[str]:
    return list(dict.fromkeys(label for lane in stack.lanes for label in lane.labelled))


def _base_state(state: dict[Any, Any], foreign: tuple[str, ...]) -> dict[Any, Any]:
    """Return the base's own entries; a parameter without any (its moments were reset) is left out, not left empty."""
    found = {}
    for i, held in state.items():
        own = {k: v for k, v in held.items() if not _belongs(k, foreign)} if isinstance(held, dict) else held
        # some bases keep numbers of the whole run here, under names: 0 is one of them
        if own or not isinstance(held, dict):
            found[i] = own
    return found


def _belongs(key: Any, prefixes: tuple[str, ...]) -> bool:
    return isinstance(key, str) and key.startswith(prefixes) if prefixes else False


def _report(stack: "Stack", groups: list[dict[str, Any]]) -> LoadReport:
    saved = list(dict.fromkeys(label for group in groups for label in _saved_labels(group)))
    own = _labels(stack)
    return LoadReport(
        taken=["base", *(label for label in own if label in saved)],
        fresh=[label for label in own if label not in saved],
        dropped=[label for label in saved if label not in own],
    )


def _saved_labels(group: dict[str, Any]) -> list[str]:
    named = [label for label in str(group.get("metaopt.labels", "")).split(",") if label]
    return named + [key.split(".")[0] for key in group if "." in key and not key.startswith("metaopt.")]


def _merge_groups(stack: "Stack", saved: list[dict[str, Any]], report: LoadReport) -> list[dict[str, Any]]:
    """Return groups with the checkpoint's constants, and the live stack's ways to run and fresh parts."""
    dropped = tuple(f"{label}." for label in report.dropped)
    merged = []
    for group, entry in zip(saved, stack.param_groups, strict=True):
        lane = stack.lane_of(entry)
        scheduled = stack.schedules_of(entry)
        kept = {k: v for k, v in group.items() if not _belongs(k, dropped)}
        for key in lane.counter_keys:
            kept.setdefault(key, 0)
        for key, (wrapper, name) in lane.hyperparameter_keys.items():
            declared = wrapper.hyperparameters[name]
            # a scheduled value is worked out anew; a warm-up may well begin where a constant must not stand
            if wrapper.label in report.fresh or key not in kept or key in scheduled:
                kept[key] = entry[key]
            elif declared.defines_state:
                _note_kept(report, key, saved=kept[key], live=entry[key])
                kept[key] = entry[key]
            else:
                kept[key] = _checked(wrapper, name, kept[key])
        for key in RUN_FLAGS:
            if key in entry:
                kept[key] = entry[key]
            else:
                kept.pop(key, None)
        kept.setdefault("metaopt.updates", 0)
        kept.setdefault("metaopt.swapped", "")
        kept.setdefault("metaopt.template", "")
        kept.setdefault("metaopt.lr_scale", 1.0)
        kept["metaopt.total_steps"] = entry["metaopt.total_steps"]
        kept["metaopt.labels"] = entry["metaopt.labels"]
        merged.append(kept)
    return merged


def _checked(wrapper: Wrapper, name: str, value: Any) -> Any:
    try:
        return wrapper.hyperparameters[name].validate(value, where=f"the checkpoint's {wrapper.label}")
    except HyperparameterError as error:
        raise CheckpointError(str(error)) from error


def _note_kept(report: LoadReport, key: str, *, saved: Any, live: Any) -> None:
    line = f"{key}={live!r}, not {saved!r}"
    if saved != live and line not in report.kept:
        report.kept.append(line)


def _restore_wrapper_state(stack: "Stack", groups: list[dict[str, Any]], saved: dict[Any, Any]) -> None:
    ids = chain.from_iterable(g["params"] for g in groups)
    params = chain.from_iterable(g["params"] for g in stack.param_groups)
    state = stack.state
    if not isinstance(state, defaultdict):
        stack.state = state = defaultdict(dict, state)
    lanes = [stack.lane_of(entry) for entry in stack.param_groups for _ in entry["params"]]
    for i, p, lane in zip(ids, params, lanes, strict=True):
        held = saved.get(i)
        if not isinstance(held, dict):
            continue
        for key, value in held.items():
            label, _, name = key.partition(".") if isinstance(key, str) else ("", "", "")
            if label in lane.labelled and isinstance(value, torch.Tensor):
                state[p][key] = _placed(lane.labelled[label], name, value, p)


def _placed(wrapper: Wrapper, name: str, value: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Return a copy beside its parameter in the dtype that its slot asks for: torch would round a float32 one."""
    slot = wrapper.active_slots().get(name)
    dtype = value.dtype if slot is None or not p.is_floating_point() else slot_dtype(slot, vars(wrapper), p)
    return value.detach().to(device=p.device, dtype=dtype, copy=True)
