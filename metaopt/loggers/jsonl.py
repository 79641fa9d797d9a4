"""JSON lines: a log that any program reads."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from metaopt import LogError, Logger, hookimpl

# what the first line of a log holds
RUN = {"spec", "hparams", "tags"}


class JsonLines(Logger):
    """Writes one JSON object per line: first the run (spec, hyperparameters, tags), then `{"step": t, tag: value}`.

    What is not finite is written as "NaN", "Infinity" or "-Infinity", which JSON's numbers cannot be.
    A run that begins anew keeps the log of an earlier one, as `log.1.jsonl`, `log.2.jsonl`, ... beside it; a run that
    goes on from a checkpoint goes on in the same file. Raises LogError if the file cannot be written or is not a log.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.place = self.path.resolve()
        self._opened = False
        if self.path.is_dir():
            raise LogError(f"{self.path} is a directory: give the file to write, such as {self.path / 'log.jsonl'}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8"):
                pass
            refused = self.path.stat().st_size > 0 and not _is_log(self.path)
        except OSError as error:
            raise LogError(f"cannot write to {self.path}: {error.strerror or error}") from error
        if refused:
            raise LogError(f"{self.path} is not a log of metaopt and would be lost: give another file, or remove it")

    def open(
        self, *, step: int, tags: Sequence[str], spec: str, hparams: Mapping[str, bool | int | float | str]
    ) -> None:
        """Begin the file, or go on after `step` updates: later points are removed, a half-written line too."""
        lines = self._until(step) if step > 0 else []
        if not lines:
            values = {name: _json(value) for name, value in hparams.items()}
            lines = [json.dumps({"spec": spec, "hparams": values, "tags": list(tags)})]
        scratch = self.path.with_name(f".metaopt-{self.path.name}.tmp")
        try:
            if step == 0 and not self._opened:
                self._keep_earlier()
            scratch.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            os.replace(scratch, self.path)
        except OSError as error:
            raise LogError(f"cannot write to {self.path}: {error.strerror or error}") from error
        self._opened = True

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line for the point at `step` updates."""
        line = json.dumps({"step": step, **{tag: _json(value) for tag, value in values.items()}})
        try:
            # opened each time and never made anew: a file that was deleted would else be missed by nobody
            with self.path.open("r+", encoding="utf-8") as file:
                file.seek(0, os.SEEK_END)
                file.write(line + "\n")
        except OSError as error:
            raise LogError(f"cannot write update {step} to {self.path}: {error.strerror or error}") from error

    def _keep_earlier(self) -> None:
        """Give the log of an earlier run that lies here, if it has points, the next free number."""
        with self.path.open(encoding="utf-8") as file:
            points = sum(1 for _ in zip(file, range(2), strict=False)) - 1
        if points > 0:
            names = (self.path.with_name(f"{self.path.stem}.{number}{self.path.suffix}") for number in count(1))
            self.path.rename(next(name for name in names if not name.exists()))

    def _until(self, step: int) -> list[str]:
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and entry.get("step", 0) <= step:
                lines.append(line)
        return lines


def _is_log(path: Path) -> bool:
    """Return whether the first line of a file is the one that `open` writes."""
    try:
        with path.open(encoding="utf-8") as file:
            first = json.loads(file.readline())
    except ValueError:  # not text, or not JSON
        return False
    return isinstance(first, dict) and first.keys() == RUN


def _json(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


@hookimpl
def metaopt_loggers() -> dict[str, type[Logger]]:
    return {"jsonl": JsonLines}
