"""A folder that one process at a time writes into, cleared of what a killed one left half-written."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from metaopt.errors import LogError

# no names that a user, or another program, would give to files
SCRATCH = ".metaopt-{}.tmp"
LOCK = ".metaopt.lock"


def scratch_of(path: Path) -> Path:
    """Return the file beside `path` that is written first and then renamed to it."""
    return path.with_name(SCRATCH.format(path.name))


def write_text(path: Path, text: str) -> None:
    """Write a file of a held folder whole or not at all. Raises LogError."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file of a held folder whole or not at all. Raises LogError."""
    scratch = scratch_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(content)
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)  # a full disk is no fuller for it
        raise LogError(f"{path} cannot be written: {error.strerror or error}") from None


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Make `folder` if need be and keep other processes out of it; the system lets go of it for a process that dies.

    Files named as `scratch_of` names them are removed: nobody is writing them. `what` names the folder's use in errors.
    Raises LogError if the folder cannot be written, or another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise LogError(f"another process is writing {what} into {folder}: wait for it, or choose another") from None
    except OSError as error:
        raise LogError(f"{what} cannot be written to {folder}: {error.strerror or error}") from None
    try:
        for scratch in folder.glob(SCRATCH.format("*")):
            if scratch.is_dir():
                shutil.rmtree(scratch)
            else:
                scratch.unlink(missing_ok=True)
        yield
    finally:
        lock.release()
