"""JSON lines: a log that any program reads."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metaopt import LogError, Logger, hookimpl


class JsonLines(Logger):
    """Writes one JSON object per line: first the run (spec, hyperparameters, tags), then `{"step": t, tag: value}`.

    What is not finite is written as "NaN", "Infinity" or "-Infinity", which JSON's numbers cannot be.
    Raises LogError where the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise LogError(f"{self.path} is a directory: give the file to write, such as {self.path / 'log.jsonl'}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8"):
                pass
        except OSError as error:
            raise LogError(f"cannot write to {self.path}: {error.strerror or error}") from error

    def open(
        self, *, step: int, tags: Sequence[str], spec: str, hparams: Mapping[str, bool | int | float | str]
    ) -> None:
        """Begin the file, or go on after `step` updates: later points are removed, a half-written line too."""
        lines = self._until(step) if step > 0 else []
        if not lines:
            values = {name: _json(value) for name, value in hparams.items()}
            lines = [json.dumps({"spec": spec, "hparams": values, "tags": list(tags)})]
        scratch = self.path.with_name(self.path.name + ".tmp")
        try:
            scratch.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            os.replace(scratch, self.path)
        except OSError as error:
            raise LogError(f"cannot write to {self.path}: {error.strerror or error}") from error

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


def _json(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


@hookimpl
def metaopt_loggers() -> dict[str, type[Logger]]:
    return {"jsonl": JsonLines}
