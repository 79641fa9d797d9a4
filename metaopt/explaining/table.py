"""What an explanation holds, and how it is printed: one row per group, then findings."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

from metaopt.logger import Table

SHOWN = 3


@dataclass(frozen=True)
class Row:
    """One parameter group: how much it holds, what is done to it in which order, and its rates.

    `peak` and `end` are None where they cannot be known: a torch scheduler has no closed form that can be read.
    """

    group: str
    tensors: int
    elements: int
    order: tuple[str, ...]
    rate: float | None
    peak: float | None
    end: float | None
    decay: float | None
    state_bytes: int


@dataclass(frozen=True)
class Finding:
    """Something that is probably not as it was meant: its code, the reason in one line, and what to do."""

    code: str
    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.code}: {self.reason}. Fix: {self.fix}"


def some(names: Iterable[str]) -> str:
    """Return the first few of some names in words."""
    every = list(names)
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more


@dataclass(frozen=True)
class Explanation:
    """What an optimizer does to each parameter group, and what is suspicious about it."""

    optimizer: str
    updates: int | None
    total_steps: int | None
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...] = field(default=())
    # what was decided for the user, and how to decide otherwise
    notes: tuple[str, ...] = ()
    # how the updates are made, one line for each base
    paths: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([self._headline(), "", *_table(self.rows), *self._noted(), "", *self._found()])

    def to_json(self) -> str:
        """Return the explanation as JSON text."""
        return json.dumps(asdict(self), indent=2)

    def _headline(self) -> str:
        run = "" if self.total_steps is None else f" of {self.total_steps:,}"
        done = "" if self.updates is None else f"; {self.updates:,}{run} updates done"
        return f"{self.optimizer}{done}"

    def _noted(self) -> list[str]:
        lines = [*(f"path: {path}" for path in self.paths), *(f"note: {note}" for note in self.notes)]
        return ["", *lines] if lines else []

    def _found(self) -> list[str]:
        if not self.findings:
            return ["nothing suspicious found"]
        lines = [f"{len(self.findings)} finding{'s' if len(self.findings) > 1 else ''}"]
        for finding in self.findings:
            lines += [f"  {finding.code}: {finding.reason}", f"    fix: {finding.fix}"]
        return lines


_HEADINGS = ("group", "tensors", "elements", "rate", "peak", "end", "decay", "state", "order")


def table(rows: Sequence[Row]) -> Table:
    """Return the groups of an explanation as a table."""
    return Table(_HEADINGS, tuple(_cells(row) for row in rows))


def _table(rows: Sequence[Row]) -> list[str]:
    cells = [_HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADINGS))]
    lines = []
    for line in cells:
        # names to the left, numbers to the right; the last column is as long as it likes
        middle = [text.rjust(width) for text, width in zip(line[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([line[0].ljust(widths[0]), *middle, line[-1]]))
    return lines


def _cells(row: Row) -> tuple[str, ...]:
    numbers = (_number(row.rate), _number(row.peak), _number(row.end))
    decay = "-" if row.decay is None else _number(row.decay)
    order = " -> ".join(row.order)
    return (row.group, f"{row.tensors:,}", f"{row.elements:,}", *numbers, decay, size(row.state_bytes), order)


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"


def size(count: int) -> str:
    """Return a number of bytes as people read it: 1536 -> `1.5 KiB`; none is `none yet`."""
    if count == 0:
        return "none yet"
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"
