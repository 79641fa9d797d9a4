"""Write a text file whole or not at all."""

from contextlib import suppress
from pathlib import Path

from metaopt.errors import LogError


def write_whole(path: Path, text: str) -> None:
    """Write beside the file, then rename: a reader never finds half of it. Raises LogError."""
    try:
        _scratch(path).write_text(text, encoding="utf-8")
        _scratch(path).replace(path)
    except OSError as error:
        with suppress(OSError):  # a full disk is no fuller for it
            _scratch(path).unlink(missing_ok=True)
        raise LogError(f"{path} cannot be written: {error.strerror or error}") from None


def check_writable(path: Path) -> None:
    """Raise LogError if the file could not be written: before minutes are spent on its content."""
    try:
        _scratch(path).touch()
        _scratch(path).unlink()
    except OSError as error:
        raise LogError(f"{path} cannot be written: {error.strerror or error}") from None


def _scratch(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")
