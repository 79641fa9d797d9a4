"""CSV: a table of a run that spreadsheets and `pandas.read_csv` read."""

import csv
import os
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

from metaopt import LogError, Logger, hookimpl


class Csv(Logger):
    """Writes a row for each point and a column for each tag, `step` being the first: `pandas.read_csv("run.csv")`.

    What was not measured at a point is empty; what is not finite is `nan`, `inf` or `-inf`. A tag that appears later
    makes a new column. A run that begins anew keeps the table of an earlier one as `run.1.csv`, `run.2.csv`, ... beside
    it; a run that goes on from a checkpoint goes on in the same file. Raises LogError if the file cannot be written or
    is another table.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.place = self.path.resolve()
        self._columns: list[str] = []
        self._opened = False
        if self.path.is_dir():
            raise LogError(f"{self.path} is a directory: give the file to write, such as {self.path / 'run.csv'}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8"):
                pass
            header, _ = self._read()
        except (OSError, ValueError) as error:
            raise LogError(f"cannot write to {self.path}: {error}") from error
        if header and header[0] != "step":
            raise LogError(f"{self.path} is not a log of metaopt and would be lost: give another file, or remove it")

    def open(
        self, *, step: int, tags: Sequence[str], spec: str, hparams: Mapping[str, bool | int | float | str]
    ) -> None:
        """Begin the table, or go on after `step` updates: later rows are removed."""
        try:
            header, rows = self._read()
            if step == 0 and not self._opened and rows:
                self._keep_earlier()
            kept = [row for row in rows if _step(row) <= step] if step > 0 else []
            self._columns = list(dict.fromkeys([*(header if kept else ("step",)), *tags]))
            self._write(kept)
        except OSError as error:
            raise LogError(f"cannot write to {self.path}: {error.strerror or error}") from error
        self._opened = True

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Append the row of the point at `step` updates."""
        try:
            new = [tag for tag in values if tag not in self._columns]
            if new:
                _, rows = self._read()
                self._columns += new
                self._write(rows)
            # opened each time and never made anew: a file that was deleted would else be missed by nobody
            with self.path.open("r+", encoding="utf-8", newline="") as file:
                file.seek(0, os.SEEK_END)
                csv.writer(file, lineterminator="\n").writerow(_row(self._columns, {"step": step, **values}))
        except OSError as error:
            raise LogError(f"cannot write update {step} to {self.path}: {error.strerror or error}") from error

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        """Return the columns and the whole rows; a row that was cut off is left out."""
        with self.path.open(encoding="utf-8", newline="") as file:
            lines = csv.reader(text for text in file if text.endswith("\n"))
            header = next(lines, [])
            rows = [dict(zip(header, line, strict=False)) for line in lines if len(line) == len(header)]
        return header, [row for row in rows if row["step"].isdigit()] if "step" in header else []

    def _write(self, rows: Sequence[Mapping[str, str]]) -> None:
        scratch = self.path.with_name(f".metaopt-{self.path.name}.tmp")
        with scratch.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self._columns)
            writer.writerows(_row(self._columns, row) for row in rows)
        os.replace(scratch, self.path)

    def _keep_earlier(self) -> None:
        names = (self.path.with_name(f"{self.path.stem}.{number}{self.path.suffix}") for number in count(1))
        self.path.rename(next(name for name in names if not name.exists()))


def _row(columns: Sequence[str], values: Mapping[str, float | str]) -> list[float | str]:
    return [values.get(column, "") for column in columns]


def _step(row: Mapping[str, str]) -> int:
    return int(row["step"])


@hookimpl
def metaopt_loggers() -> dict[str, type[Logger]]:
    return {"csv": Csv}
