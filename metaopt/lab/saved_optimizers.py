"""Optimizers in the files and folders of clients: where they stand in them, and what is known beside them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from metaopt.checkpoint_file import read_saved
from metaopt.errors import CheckpointError
from metaopt.lab import checkpoint

# how deep an optimizer is looked for in nested dicts and lists
DEEPEST = 4
# the file of the optimizer in a folder: of the Trainer's checkpoint, and of Accelerate's save_state
OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin")
TRAIN_KEYS = {"run", "step", "model", "stack", "random"}


@dataclass
class SavedOptimizer:
    """An optimizer's state dict in a file, with what the client wrote beside it.

    `place` are the keys that lead to it in `content`; `shapes` are those of the model's weights by name, if the file
    has them; `steps` is the client's own count of updates.
    """

    file: Path
    client: str
    content: Any
    place: tuple[Any, ...]
    state_dict: dict[str, Any]
    shapes: dict[str, torch.Tensor] = field(default_factory=dict)
    steps: int | None = None

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups, with an empty state for parameters that have none."""
        found: list[dict[str, Any]] = self.state_dict["param_groups"]
        return found

    def size(self) -> str:
        """Return how many parameters and groups there are, in words."""
        number = sum(len(group["params"]) for group in self.groups)
        return f"{number} parameters in {len(self.groups)} group{'s' * (len(self.groups) != 1)}"

    def states(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield every parameter's name, or number, and its state."""
        for group in self.groups:
            names = group.get("param_names") or group["params"]
            for name, i in zip(names, group["params"], strict=True):
                held = self.state_dict["state"].get(i)
                yield str(name), held if isinstance(held, dict) else {}


def read(path: Path, number: int | None = None) -> SavedOptimizer:
    """Return the optimizer in a file or folder, the one with this number if there are several.

    It reads what torch.save, Lightning, Accelerate, the Hugging Face Trainer and `metaopt train` write; nothing in a
    file is executed. Raises CheckpointError.
    """
    file = _file_of(path)
    content = checkpoint.load(file) if file.is_dir() else read_saved(file)
    found = list(_optimizers(content, (), DEEPEST))
    if not found:
        raise CheckpointError(f"{file} holds no optimizer's state_dict (a dict with 'state' and 'param_groups')")
    if number is None and len(found) > 1:
        places = ", ".join(f"{i}: {'.'.join(map(str, place))}" for i, (place, _) in enumerate(found))
        raise CheckpointError(f"{file} holds {len(found)} optimizers ({places}): choose one with --optimizer")
    if not 0 <= (number or 0) < len(found):
        raise CheckpointError(f"{file} holds {len(found)} optimizers, counted from 0: --optimizer {number} is none")
    place, state_dict = found[number or 0]
    client, steps = _client(file, content)
    return SavedOptimizer(file, client, content, place, state_dict, _weights(file, content), steps)


def _file_of(path: Path) -> Path:
    if not path.is_dir() or (path / checkpoint.MANIFEST).is_file():
        return path
    for name in OPTIMIZER_FILES:
        if (path / name).is_file():
            return path / name
    for folder in (path, path / "checkpoints"):
        if newest := checkpoint.found(folder):
            return newest[0]
    if (path / ".metadata").exists():
        raise CheckpointError(
            f"{path} is a distributed checkpoint: torch.distributed.checkpoint.format_utils.dcp_to_torch_save makes "
            f"one file of it"
        )
    raise CheckpointError(f"{path} has neither {' nor '.join(OPTIMIZER_FILES)}: give the file with the optimizer")


def _optimizers(content: Any, place: tuple[Any, ...], depth: int) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    if isinstance(content, Mapping):
        if isinstance(content.get("param_groups"), list) and isinstance(content.get("state"), Mapping):
            yield place, dict(content)
            return
        members = list(content.items())
    else:
        members = list(enumerate(content)) if isinstance(content, list | tuple) else []
    for key, member in members if depth else ():
        yield from _optimizers(member, (*place, key), depth - 1)


def _client(file: Path, content: Any) -> tuple[str, int | None]:
    """Return who wrote a file, and how many updates that client counts."""
    trainer = file.parent / "trainer_state.json"
    if file.name in OPTIMIZER_FILES and trainer.is_file():
        try:
            return "Hugging Face Trainer", _whole(json.loads(trainer.read_text()).get("global_step"))
        except (OSError, ValueError, AttributeError):
            return "Hugging Face Trainer", None
    if file.name in OPTIMIZER_FILES:
        return "Accelerate", None
    if isinstance(content, Mapping) and "pytorch-lightning_version" in content:
        return "Lightning", _whole(content.get("global_step"))
    if isinstance(content, Mapping) and content.keys() >= TRAIN_KEYS:
        return "metaopt train", None
    return "torch", None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _weights(file: Path, content: Any) -> dict[str, torch.Tensor]:
    """Return the model's weights, for their shapes, if they are in the same file."""
    members = content.values() if isinstance(content, Mapping) else ()
    for member in members:
        if isinstance(member, Mapping) and member:
            tensors = {str(k): v for k, v in member.items() if isinstance(v, torch.Tensor)}
            if len(tensors) == len(member):
                return tensors
    return {}
