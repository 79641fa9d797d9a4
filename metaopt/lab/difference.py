"""How two saved optimizers differ: updates, parameters, parts, values and state."""

from collections.abc import Iterator
from typing import Any

import torch

from metaopt.engine.checkpoint.matching import Matched, matched
from metaopt.engine.checkpoint.precedence import count_of, same
from metaopt.engine.checkpoint.report import shown_first
from metaopt.engine.run.entries import FORMAT_KEY, LABELS, TOTAL_STEPS, UPDATES
from metaopt.errors import CheckpointError
from metaopt.lab.saved_optimizers import SavedOptimizer

# entries of a group that say which parameters it has, not what is done to them
NOT_VALUES = {"params", "param_names", "name", LABELS, UPDATES, TOTAL_STEPS}


def summary(saved: SavedOptimizer) -> str:
    """Return in one line what a file holds."""
    keys = dict.fromkeys(key for _, held in saved.states() for key in held)
    count = _count(saved)
    updates = saved.steps if count is None else count
    made = "an unknown number of" if updates is None else updates
    state = ", ".join(map(str, keys)) or "none"
    return f"{saved.client}, {saved.size()}, {made} updates; state: {state}"


def differences(a: SavedOptimizer, b: SavedOptimizer) -> list[str]:
    """Return in which ways b differs from a, a line each: none if the two continue alike."""
    found = list(_of_whole(a, b))
    try:
        pairs = matched(b.groups, a.state_dict, None)
    except CheckpointError as error:
        reason = "they have other groups, and no names" if "names" in str(error) else str(error)
        return [*found, f"parameters  cannot be compared: {reason}"]
    return [*found, *_of_parameters(pairs), *_of_values(a, b, pairs), *_of_state(a, b, pairs)]


def _of_whole(a: SavedOptimizer, b: SavedOptimizer) -> Iterator[str]:
    counts = [_count(saved) for saved in (a, b)]
    if counts[0] != counts[1]:
        yield f"updates     {counts[0]} -> {counts[1]}"
    for key, what in ((TOTAL_STEPS, "total_steps"), (FORMAT_KEY, "format")):
        values = [saved.groups[0].get(key) if saved.groups else None for saved in (a, b)]
        if values[0] != values[1]:
            yield f"{what:<11} {values[0]} -> {values[1]}"
    labels = [_labels(saved) for saved in (a, b)]
    for what, only in (("parts gone", labels[0] - labels[1]), ("parts new", labels[1] - labels[0])):
        if only:
            yield f"{what:<11} {', '.join(sorted(only))}"


def _count(saved: SavedOptimizer) -> int | None:
    count, counted = count_of(saved.groups, saved.state_dict["state"])
    return None if counted == "nowhere" else count


def _labels(saved: SavedOptimizer) -> set[str]:
    found: set[str] = set()
    for group in saved.groups:
        found |= {label for label in str(group.get(LABELS, "")).split(",") if label}
    return found


def _of_parameters(pairs: Matched) -> Iterator[str]:
    for what, names in (("gone", pairs.gone), ("new", pairs.new)):
        if names:
            yield f"{what:<11} {', '.join(shown_first(names))}"
    if not pairs.is_same_order and not (pairs.gone or pairs.new):
        moved = any(not pairs.is_same_group(position) for position in range(len(pairs.ids)))
        yield f"parameters  are in another {'grouping' if moved else 'order'}"


def _of_values(a: SavedOptimizer, b: SavedOptimizer, pairs: Matched) -> Iterator[str]:
    for position, group in enumerate(b.groups):
        sources = [a.groups[source] for source in pairs.sources[position]]
        called = f" in group {group.get('name', position)}" if len(b.groups) > 1 else ""
        for key in dict.fromkeys([*(key for source in sources for key in source), *group]):
            before = [source[key] for source in sources if key in source]
            if key in NOT_VALUES or key == FORMAT_KEY or not sources:
                continue
            if not before or key not in group:
                shown = _text(group[key]) if key in group else _text(before[0])
                yield f"value       {key}={shown}{called} only in {'the second' if key in group else 'the first'}"
            elif not all(same(value, group[key]) for value in before):
                yield f"value       {key}{called}: {' and '.join(map(_text, before))} -> {_text(group[key])}"


def _of_state(a: SavedOptimizer, b: SavedOptimizer, pairs: Matched) -> Iterator[str]:
    """Yield, by key of the state, how many parameters have another tensor, and by how much."""
    keys: dict[str, list[float | None]] = {}
    for group, ids in zip(b.groups, pairs.ids, strict=True):
        for i, before in zip(group["params"], ids, strict=True):
            then, now = a.state_dict["state"].get(before), b.state_dict["state"].get(i)
            then, now = (held if isinstance(held, dict) else {} for held in (then, now))
            for key in dict.fromkeys([*then, *now]):
                keys.setdefault(str(key), []).append(_distance(then.get(key), now.get(key)))
    for key, distances in keys.items():
        unequal = [d for d in distances if d != 0.0]
        if unequal:
            off = [d for d in unequal if d is not None]
            by = f", by at most {max(off):.3g}" if off else ""
            other = len(unequal) - len(off)
            missing = f"; {other} only in one file, or of another shape" if other else ""
            yield f"state       {key}: {len(unequal)} of {len(distances)} differ{by}{missing}"


def _distance(a: Any, b: Any) -> float | None:
    """Return by how much two entries differ, 0.0 if not at all, or None if that is not a number."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape:
        if torch.equal(a, b):
            return 0.0
        if a.is_complex() or b.is_complex():
            return float((a - b).abs().max())
        return float((a.double() - b.double()).abs().nan_to_num(torch.inf).max())
    if isinstance(a, int | float) and isinstance(b, int | float):
        return float(abs(a - b))
    try:
        return 0.0 if type(a) is type(b) and bool(a == b) else None
    except (RuntimeError, ValueError):  # lists of tensors
        return None


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    return f"{value:.6g}" if isinstance(value, float) else repr(value)
