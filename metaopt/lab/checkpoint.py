"""Checkpoints that are whole or absent: written aside, synced, renamed; the name carries the checksum."""

import hashlib
import io
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from metaopt.checkpoint_file import read_saved
from metaopt.errors import CheckpointError
from metaopt.lab.holding import scratch_of

KEPT = 2


def save(folder: Path, step: int, content: dict[str, Any]) -> Path:
    """Write `step-<number>-<sha256>.pt` and keep the last two; a crash leaves the old ones. Raises CheckpointError.

    The folder must be there: one that disappeared during the run is not made anew, its older checkpoints are gone.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    path = folder / f"step-{step:09d}-{hashlib.sha256(data).hexdigest()}.pt"
    scratch = scratch_of(path)
    try:
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        _sync(folder)
        for old in found(folder)[KEPT:]:
            old.unlink(missing_ok=True)
    except OSError as error:
        with suppress(OSError):
            scratch.unlink()  # half a checkpoint on a full disk is in everybody's way
        raise CheckpointError(
            f"checkpoint {step} cannot be written to {folder}: {error.strerror or error}. {newest(folder)}"
        ) from None
    return path


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return a checkpoint's content, which can hold tensors and plain values alone.

    Raises CheckpointError, naming the newest whole checkpoint, where the file is damaged.
    """
    if not is_whole(path):
        raise CheckpointError(f"the checkpoint {path} is damaged: delete it to continue without. {newest(path.parent)}")
    content: dict[str, Any] = read_saved(path, device)
    return content


def is_whole(path: Path) -> bool:
    """Tell whether the file's bytes have the checksum that its name carries."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == path.stem.rpartition("-")[2]
    except OSError:
        return False


def found(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, the newest first."""
    return sorted(folder.glob("step-*.pt"), reverse=True)


def newest(folder: Path | None) -> str:
    """Return a sentence that names the newest whole checkpoint of a folder."""
    whole = next((path for path in found(folder) if is_whole(path)), None) if folder is not None else None
    return f"The newest whole checkpoint: {whole}" if whole else "There is no whole checkpoint"


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)  # a rename is on the disk when its directory is
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
