"""Checkpoints of `metaopt train` in their folder: which there are, whether they are whole, what they hold.

A checkpoint is a folder `step-<number>` with the tensors, in the format of torch.distributed.checkpoint, `rest.pt` with
everything else, and `manifest.json` with the checksum of each file. The file `newest` of the folder above names the
last one that was published. Replicas that train by local updates have a part each: `replica<number>.` stands before the
names of its tensors, and `rest.pt` has a list of what else is their own. Files `step-<number>-<sha256>.pt` of earlier
versions are read as well.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from metaopt.checkpoint_file import read_saved
from metaopt.errors import CheckpointError

POINTER = "newest"
MANIFEST = "manifest.json"
REST = "rest.pt"
CONTENT = {"run", "step", "model", "stack", "random"}

REPLICAS = "replicas"

Target = Callable[[str, dict[str, Any]], torch.Tensor | None]


def name_of(step: int) -> str:
    """Return the name of a checkpoint's folder."""
    return f"step-{step:09d}"


def found(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder that were published, the newest first."""
    whole = [path for path in folder.glob("step-*") if path.suffix == ".pt" or (path / MANIFEST).is_file()]
    last = _published(folder)
    # one that is newer than the pointer was not published: its writer was killed before
    kept = [path for path in whole if last is None or _step(path) <= last]
    return sorted(kept, key=_step, reverse=True)


def newest(folder: Path | None) -> str:
    """Return a sentence that names the newest whole checkpoint of a folder."""
    whole = next((path for path in found(folder) if is_whole(path)), None) if folder is not None else None
    return f"The newest whole checkpoint: {whole}" if whole else "There is no whole checkpoint"


def is_whole(path: Path, rank: int = 0, ranks: int = 1) -> bool:
    """Return whether the files of a checkpoint have their checksums; of several ranks each looks at some of them."""
    try:
        if path.suffix == ".pt":
            return sha256(path) == path.stem.rpartition("-")[2]
        files = json.loads((path / MANIFEST).read_text())["files"]
        return all(sha256(path / name) == files[name] for name in sorted(files)[rank::ranks])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def prefix(replica: int) -> str:
    """Return what stands before the names of a replica's tensors."""
    return f"replica{replica}."


def load(path: Path, target: Target | None = None, replica: int = 0) -> dict[str, Any]:
    """Return what a checkpoint holds, with whole tensors, or what `target(key, rest)` gives for a tensor to read into.

    Of replicas that train by local updates it is the part of one of them; `replicas` is then how many there were.

    It can hold tensors and plain values alone. Raises CheckpointError, naming the newest whole checkpoint, where a
    file is damaged.
    """
    if target is None and not is_whole(path):
        raise damaged(path)
    rest = read_saved(path if path.suffix == ".pt" else path / REST)
    if (
        not isinstance(rest, dict)
        or rest.keys() - {REPLICAS} != CONTENT
        or not all(isinstance(rest[k], dict) for k in _DICTS)
    ):
        raise CheckpointError(
            f"{path} was not written by `metaopt train`: expected the entries {', '.join(sorted(CONTENT))}"
        )
    if path.suffix == ".pt":
        rest["random"] = [rest["random"]]
        return rest
    from metaopt.lab.tensor_files import read_tensors, sizes_of

    replicas = rest.pop(REPLICAS, None)
    own = ""
    if replicas is not None:
        replica = replica if replica < len(replicas) else 0
        own = prefix(replica)
        rest |= {**replicas[replica], REPLICAS: len(replicas)}
    tensors = {}
    for key, (size, dtype) in sizes_of(path).items():
        if not key.startswith(own):
            continue
        given = None if target is None else target(key.removeprefix(own), rest)
        if given is None or given.shape != size:
            tensors[key] = torch.empty(size, dtype=dtype)
        else:
            tensors[key] = torch.empty_like(given, dtype=dtype)
    read_tensors(path, tensors)
    return joined({key.removeprefix(own): tensor for key, tensor in tensors.items()}, rest)


_DICTS = ("run", "model", "stack")


def damaged(path: Path) -> CheckpointError:
    """Return the error for a checkpoint whose files do not have their checksums."""
    return CheckpointError(f"the checkpoint {path} is damaged: delete it to continue without. {newest(path.parent)}")


def separated(content: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors of a content by key, `model.<name>` and `stack.<number>.<entry>`, and the rest of it."""
    tensors = {f"model.{name}": value for name, value in content["model"].items() if isinstance(value, torch.Tensor)}
    others = {name: value for name, value in content["model"].items() if not isinstance(value, torch.Tensor)}
    state: dict[Any, dict[str, Any]] = {}
    for number, entries in content["stack"]["state"].items():
        state[number] = {}
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"stack.{number}.{key}"] = value
            else:
                state[number][key] = value
    return tensors, {**content, "model": others, "stack": {**content["stack"], "state": state}}


def joined(tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """Return the content that `separated` has taken apart."""
    content = {**rest, "model": dict(rest["model"]), "stack": {**rest["stack"]}}
    state = {number: dict(entries) for number, entries in rest["stack"]["state"].items()}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "model":
            content["model"][name] = tensor
        else:
            number, _, entry = name.partition(".")
            state.setdefault(int(number), {})[entry] = tensor
    content["stack"]["state"] = state
    return content


def sha256(path: Path) -> str:
    """Return the checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _published(folder: Path) -> int | None:
    try:
        return _step(Path((folder / POINTER).read_text().strip()))
    except (OSError, ValueError):
        return None


def _step(path: Path) -> int:
    number = path.name.removesuffix(".pt").split("-")[1]
    return int(number) if number.isdigit() else -1
