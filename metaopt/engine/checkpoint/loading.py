"""Loading a checkpoint into a run, whole or not at all. Changes groups and state through the base's own load."""

import copy
from collections import defaultdict
from collections.abc import Mapping
from itertools import chain as joined
from typing import Any

import torch

from metaopt.engine.chain import Chain, ParamGroup, ParamState
from metaopt.engine.checkpoint.matching import Matched, matched
from metaopt.engine.checkpoint.precedence import belongs, count_of, counts_of_bases, merged_groups
from metaopt.engine.checkpoint.report import Choice, LoadReport
from metaopt.engine.checkpoint.validation import state_after_step, validate_fit, validate_form
from metaopt.engine.param_state.placeholders import remove_placeholders
from metaopt.engine.param_state.slot_values import copy_for_slot
from metaopt.engine.run.entries import LABELS, TEMPLATE, TOTAL_STEPS, UPDATES
from metaopt.engine.run.groups import place_scalars
from metaopt.engine.run.run import Run
from metaopt.torch_internals import only_class_hooks


def load(run: Run, state_dict: dict[str, Any], choice: Choice = Choice()) -> LoadReport:  # noqa: B008  it is frozen
    """Load into the base through its own `load_state_dict`, then restore what belongs to wrappers, uncast."""
    validate_form(state_dict)
    found = matched(run.param_groups, state_dict, choice.names)
    report = _report(run, found)
    validate_fit(run, found, choice, report.updates)
    groups = merged_groups(run, found, choice, report)
    saved_state = found.state
    base_state = _base_state(saved_state, tuple(f"{label}." for label in (*run.structure.labels(), *report.dropped)))
    extras = {k: _without_bytes(v) for k, v in state_dict.items() if k not in ("state", "param_groups")}
    live = run.base.state, run.base.param_groups
    try:
        with only_class_hooks(run.base):
            run.base.load_state_dict({**extras, "state": base_state, "param_groups": groups})
        _restore_dtypes(run, groups, base_state)
        _restore_wrapper_state(run, groups, saved_state)
        for group in run.param_groups:
            place_scalars(run, group, run.structure.chain_of(group))
        run.begin_schedules()  # one may have no value at the loaded count
    except BaseException:
        run.base.state, run.base.param_groups = live
        raise
    for p in run.state:  # what the constructor made of these will not be needed
        run.constructor_state.pop(p, None)
    if any(str(group[TEMPLATE]).startswith("made") for group in run.param_groups):
        # saved before the base had begun: only what wrappers had summed up by then is real
        remove_placeholders(run, keep_early=True)
    return report


# ---- what is taken


def _base_state(state: dict[Any, Any], foreign: tuple[str, ...]) -> dict[Any, Any]:
    """Return the base's own entries; a parameter without any (its moments were reset) is left out, not left empty."""
    found = {}
    # parameters share their keys: each is looked at once
    keys = {key for saved in state.values() if isinstance(saved, dict) for key in saved}
    of_base = {key for key in keys if not belongs(key, foreign)}
    for i, saved in state.items():
        own = {k: v for k, v in saved.items() if k in of_base} if isinstance(saved, dict) else saved
        # some bases keep numbers of the whole run here, under names: 0 is one of them
        if own or not isinstance(saved, dict):
            found[i] = own
    return found


def _without_bytes(value: Any) -> Any:
    """Return what a base wrote beside state and groups, without bytes: a base might unpickle them."""
    if not isinstance(value, dict):
        return copy.copy(value)
    return {key: _without_bytes(v) for key, v in value.items() if not isinstance(v, bytes | bytearray)}


def _report(run: Run, found: Matched) -> LoadReport:
    saved = list(dict.fromkeys(label for group in found.groups for label in _saved_labels(group)))
    own = run.structure.labels()
    is_bare = not any(UPDATES in group for group in found.groups)
    updates, counted = count_of(found.groups, found.state, counts_of_bases(run) if is_bare else {})
    total, length = found.groups[0].get(TOTAL_STEPS), run.structure.total_steps
    return LoadReport(
        taken=["base", *(label for label in own if label in saved)],
        fresh=[label for label in own if label not in saved],
        dropped=[label for label in saved if label not in own],
        new=found.new,
        gone=found.gone,
        matched=found.by,
        updates=updates,
        counted=counted,
        lengths=None if total is None or length is None or total == length else (total, length),
        count_is_needed=counted == "nowhere" and run.has_schedules,
    )


def _saved_labels(group: ParamGroup) -> list[str]:
    named = [label for label in str(group.get(LABELS, "")).split(",") if label]
    return named + [key.split(".")[0] for key in group if "." in key and not key.startswith("metaopt.")]


def _restore_wrapper_state(run: Run, groups: list[ParamGroup], saved: dict[Any, Any]) -> None:
    ids = joined.from_iterable(g["params"] for g in groups)
    if not isinstance(run.state, defaultdict):
        run.base.state = defaultdict(dict, run.state)
    state = run.state
    for group in run.param_groups:
        chain = run.structure.chain_of(group)
        slots = {keyed.key: keyed for keyed in chain.slots}
        # by key, which parameters share: whether it is a wrapper's that is to be restored
        restored: dict[Any, bool] = {}
        for p in group["params"]:
            entries = saved.get(next(ids))
            if not isinstance(entries, dict):
                continue
            for key, value in entries.items():
                if key not in restored:
                    restored[key] = _is_restored(chain, key)
                if not restored[key] or not isinstance(value, torch.Tensor):
                    continue
                keyed = slots.get(key)
                if keyed is not None and p.is_floating_point():
                    # torch would round a float32 tensor of a 16-bit parameter
                    state[p][key] = copy_for_slot(value, keyed.slot, vars(keyed.wrapper), p)
                else:
                    state[p][key] = value.detach().to(device=p.device, copy=True)


def _is_restored(chain: Chain, key: Any) -> bool:
    """Return whether an entry of a parameter's state belongs to a wrapper."""
    label, _, name = key.partition(".") if isinstance(key, str) else ("", "", "")
    slot = chain.labelled[label].slots.get(name) if label in chain.labelled else None
    # an earlier version kept the weights from before the update in the state
    return label in chain.labelled and (slot is None or slot.kind != "previous")


def _restore_dtypes(run: Run, groups: list[ParamGroup], saved: Mapping[Any, Any]) -> None:
    """Replace tensors that torch cast to the parameter's dtype on load if the base itself keeps them in the saved one.

    Otherwise float32 moments of a bfloat16 parameter come back rounded, and a float32 product of a float64 one counts
    on with other digits.
    """
    known: dict[Any, ParamState] = {}
    for saved_group, group in zip(groups, run.param_groups, strict=True):
        for i, p in zip(saved_group["params"], group["params"], strict=True):
            before, loaded = saved.get(i), run.state.get(p)
            if not (isinstance(before, dict) and isinstance(loaded, dict) and _was_cast(before, loaded)):
                continue
            kind = id(group), p.dtype, p.device, p.dim()
            if kind not in known:
                # dtypes do not depend on the size
                small = torch.zeros([2] * p.dim(), dtype=p.dtype, device=p.device)
                known[kind] = state_after_step(run.structure.chain_of(group), group, small)
            loaded.update(_unrounded(before, loaded, known[kind]))


def _unrounded(saved: Any, loaded: Any, kept: Any) -> Any:
    """Return what was loaded with the saved tensors in place of cast ones, if the base keeps them in that dtype."""
    if isinstance(saved, torch.Tensor) and isinstance(loaded, torch.Tensor) and isinstance(kept, torch.Tensor):
        wanted = saved.dtype != loaded.dtype and saved.dtype == kept.dtype
        return saved.detach().to(device=loaded.device, copy=True) if wanted else loaded
    if isinstance(saved, dict) and isinstance(loaded, dict) and isinstance(kept, dict):
        return {k: _unrounded(saved.get(k), v, kept.get(k)) for k, v in loaded.items()}
    lists = all(isinstance(value, list | tuple) for value in (saved, loaded, kept))
    if lists and len(saved) == len(loaded) == len(kept):
        return type(loaded)(_unrounded(*values) for values in zip(saved, loaded, kept, strict=True))
    return loaded


def _was_cast(saved: Any, loaded: Any) -> bool:
    """Return whether a tensor in what was loaded has another dtype than the saved one."""
    if isinstance(saved, torch.Tensor) and isinstance(loaded, torch.Tensor):
        return saved.dtype != loaded.dtype
    if isinstance(saved, dict) and isinstance(loaded, dict):
        for key, value in loaded.items():
            before = saved.get(key)
            # what torch hands on as it is was not cast
            if before is not value and _was_cast(before, value):
                return True
        return False
    if isinstance(saved, list | tuple) and isinstance(loaded, list | tuple) and len(saved) == len(loaded):
        return any(_was_cast(*pair) for pair in zip(saved, loaded, strict=True))
    return False
