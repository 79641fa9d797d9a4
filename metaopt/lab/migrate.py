"""A checkpoint for another stack: what would be taken, dropped and begun anew, and the file with it."""

import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from metaopt.construction.building import build
from metaopt.engine.chain import RUN_FLAGS
from metaopt.engine.run.entries import TOTAL_STEPS
from metaopt.errors import CheckpointError, MetaoptWarning
from metaopt.lab.holding import scratch_of
from metaopt.lab.saved_optimizers import SavedOptimizer
from metaopt.scheduled_values import LR_SCALE
from metaopt.stack import Stack


@dataclass
class Migration:
    """A saved optimizer, and the stack that has loaded it over parameters of the same shapes."""

    saved: SavedOptimizer
    stack: Stack

    def state_dict(self) -> dict[str, Any]:
        """Return the stack's state dict; tensors that were taken are those of the file, bit for bit."""
        made = self.stack.state_dict()
        state = dict(made["state"])
        groups = []
        for group, old in zip(made["param_groups"], self.saved.groups, strict=True):
            for i, before in zip(group["params"], old["params"], strict=True):
                held = self.saved.state_dict["state"].get(before)
                if i in state and isinstance(held, dict) and isinstance(state[i], dict):
                    state[i] = {key: held.get(key, value) for key, value in state[i].items()}
            # how to run is of no concern to a file
            flags = {key: old[key] for key in RUN_FLAGS if key in old}
            groups.append({**{k: v for k, v in group.items() if k not in RUN_FLAGS}, **flags})
        return {**made, "state": state, "param_groups": groups}

    def lines(self) -> list[str]:
        """Return what would be taken, dropped and begun anew, a line each."""
        report = self.stack.load_report
        assert report is not None
        before = Counter(key for _, held in self.saved.states() for key in held)
        after = Counter(key for held in self.stack.state.values() if isinstance(held, dict) for key in held)
        rows = [
            ("read", f"{self.saved.file}: {self.saved.client}, {self.saved.size()}"),
            ("stack", str(self.stack.spec)),
            ("updates", f"{self.stack.updates}{self._counted()}"),
            ("taken", _counted(before & after)),
            ("dropped", _counted(before - after)),
            ("begun anew", ", ".join(report.fresh)),
        ]
        for difference in report.differences:
            whose = {"checkpoint": "the file's", "stack": "the stack's", "schedule": "by the schedule"}
            rows.append(("value", f"{difference}, {whose[difference.taken]}"))
        if report.lengths:
            rows.append(("extended", "from {} to {} updates".format(*report.lengths)))
        return [f"{what:<11} {text}" for what, text in rows if text]

    def _counted(self) -> str:
        report = self.stack.load_report
        if report is None or report.counted == "checkpoint":
            return ""
        if report.counted == "base":
            return ", as the base counts them"
        if self.stack.updates:
            return ", as given" if self.saved.steps != self.stack.updates else f", as {self.saved.client} counts them"
        return "; the file does not say how many were made: --updates sets the count"

    def write(self, path: Path) -> None:
        """Write the file with the new state dict in the old one's place, whole or not. Raises CheckpointError."""
        if self.saved.client == "metaopt train":
            raise CheckpointError(
                f"{self.saved.file} belongs to `metaopt train`, which continues it itself: give --resume --keep live "
                f"with the new stack"
            )
        scratch = scratch_of(path)
        try:
            torch.save(_replaced(self.saved.content, self.saved.place, self.state_dict()), scratch)
            scratch.replace(path)
        except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
            with suppress(OSError):
                scratch.unlink()
            raise CheckpointError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None


def migrate(
    saved: SavedOptimizer,
    spec: str,
    *,
    keep: Literal["live", "saved"] | None = None,
    extend: bool = False,
    total_steps: int | None = None,
    updates: int | None = None,
) -> Migration:
    """Load a saved optimizer into a stack over parameters of the same shapes, names and groups. Raises MetaoptError.

    `total_steps` is that of the checkpoint if it is not given. With keep="live" values that differ between the saved
    groups stay, because they are the groups' own.
    """
    groups = [_parameters(saved, group) for group in saved.groups]
    length = saved.groups[0].get(TOTAL_STEPS) if saved.groups else None
    stack = build(groups, spec, total_steps=length if total_steps is None else total_steps)
    if len(stack.param_groups) == len(saved.groups):
        _keep_own_values(stack, saved.groups)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MetaoptWarning)  # the lines say it
        stack.load_state_dict(saved.state_dict, keep=keep, extend=extend)
    assert stack.load_report is not None
    if updates is None and stack.load_report.counted == "nowhere":
        updates = saved.steps
    if updates is not None:
        stack.updates = updates
    return Migration(saved, stack)


def _parameters(saved: SavedOptimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group with parameters of zeros in the shapes of the saved ones."""
    names = group.get("param_names")
    if names is None and all(isinstance(i, str) for i in group["params"]):
        names = group["params"]
    made = []
    for position, i in enumerate(group["params"]):
        name = names[position] if names else None
        weights = saved.shapes.get(name) if name else None
        p = torch.nn.Parameter(_like(weights, saved.state_dict["state"].get(i)))
        made.append(p if name is None else (name, p))
    named = {"name": group["name"]} if "name" in group else {}
    return {"params": made, **named}


def _like(weights: torch.Tensor | None, held: Any) -> torch.Tensor:
    """Return zeros in the shape that most tensors of a parameter's state have: a base may keep others beside."""
    if weights is not None:
        return torch.zeros_like(weights, device="cpu")
    tensors = [v for k, v in held.items() if isinstance(v, torch.Tensor)] if isinstance(held, dict) else []
    whole = [v for v in tensors if v.dim()] or tensors
    if not whole:
        return torch.zeros(1)  # the optimizer keeps nothing, so that nothing depends on the shape
    shape, _ = Counter(v.shape for v in whole).most_common(1)[0]
    first = next(v for v in whole if v.shape == shape)
    return torch.zeros(shape, dtype=first.dtype if first.is_floating_point() else torch.float32)


def _keep_own_values(stack: Stack, saved: list[dict[str, Any]]) -> None:
    """Give the stack's groups what the saved ones do not share."""
    for group, old in zip(stack.param_groups, saved, strict=True):
        chain, schedules = stack.chain_of(group), stack.schedules_of(group)
        for key in ((chain.constructor_names & group.keys()) | chain.hyperparameters.keys()) - RUN_FLAGS:
            values = [other[key] for other in saved if key in other]
            if key in old and key not in schedules and any(value != values[0] for value in values):
                group[key] = old[key]
        if LR_SCALE in old:
            group[LR_SCALE] = old[LR_SCALE]


def _counted(keys: Counter[str]) -> str:
    return ", ".join(f"{key} of {number}" for key, number in keys.items())


def _replaced(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    """Return the content of a file with another value at one place."""
    if not place:
        return value
    first, *rest = place
    inner = _replaced(content[first], tuple(rest), value)
    if isinstance(content, Mapping):
        return {**content, first: inner}
    return type(content)(inner if i == first else member for i, member in enumerate(content))
