"""Logger: where measurements go, and what can be written besides numbers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

HyperValue = bool | int | float | str


class Margin(tuple[str, str, str]):
    """The tags of a line and of the lower and upper end of a band around it."""

    __slots__ = ()


Layout = Mapping[str, Mapping[str, Sequence[str]]]
"""The charts of a dashboard: section -> chart -> tags, each exact or a regular expression."""


@dataclass(frozen=True)
class Histogram:
    """How many numbers lie between each two edges: `counts[i]` of them in [edges[i], edges[i + 1])."""

    edges: tuple[float, ...]
    counts: tuple[float, ...]


@dataclass(frozen=True)
class Table:
    """Rows of numbers and text under column headings; `markdown()` is the same as text."""

    columns: tuple[str, ...]
    rows: tuple[tuple[HyperValue | None, ...], ...]

    def markdown(self) -> str:
        """Return the table as Markdown; numbers have four digits, None is a dash."""
        lines = [self.columns, ("---",) * len(self.columns), *(tuple(map(_cell, row)) for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: HyperValue | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    # a bar ends a cell, and a specification is full of bars
    return str(value).replace("|", "\\|").replace("\n", " ")


@dataclass(frozen=True)
class RunPage:
    """What a person wants to know of a run before its first point, by tag: text is Markdown, images are PNG."""

    texts: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)
    images: Mapping[str, bytes] = field(default_factory=dict)
    layout: Layout = field(default_factory=dict)


class Logger(ABC):
    """Where measurements go. One logger serves one run; only rank 0 writes to it.

    `place` is what only one run at a time may write to, such as a file's path; None: any number of runs may.
    A logger need only take scalars: histograms, texts, images, tables and the layout of a dashboard are dropped by
    default. Each of these methods raises LogError (or OSError) where it cannot write.
    """

    place: Any = None

    @abstractmethod
    def open(self, *, step: int, tags: Sequence[str], spec: str, hparams: Mapping[str, HyperValue]) -> None:
        """Begin the run, or go on with it after `step` updates: drop every point of a later step.

        `tags` are those known beforehand, `spec` is the stack as text, `hparams` are its constants by name.
        Called before the first point, and again when a checkpoint takes the run back.
        """

    @abstractmethod
    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write one point per tag at `step` updates, durably. Raises LogError (or OSError) where it cannot."""

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:  # noqa: B027  not abstract: may be dropped
        """Write one histogram per tag."""

    def texts(self, step: int, values: Mapping[str, str]) -> None:  # noqa: B027
        """Write one text per tag, in Markdown."""

    def images(self, step: int, values: Mapping[str, bytes]) -> None:  # noqa: B027
        """Write one image per tag, each the content of a PNG file."""

    def tables(self, step: int, values: Mapping[str, Table]) -> None:
        """Write one table per tag; the default writes them as texts."""
        self.texts(step, {tag: table.markdown() for tag, table in values.items()})

    def layout(self, panels: Layout) -> None:  # noqa: B027
        """Arrange tags in the charts of a dashboard: section -> chart -> tags or regular expressions."""

    def close(self) -> None:  # noqa: B027
        """Write what is left and let go; the default does nothing."""


_PAGE_METHODS = ("texts", "tables", "images", "layout")


def takes_pages(logger: Logger) -> bool:
    """Return whether a logger writes what a `RunPage` holds, so that there is a reason to make one."""
    return any(getattr(type(logger), name) is not getattr(Logger, name) for name in _PAGE_METHODS)


def show_page(logger: Logger, step: int, page: RunPage) -> None:
    """Have a logger write what describes the run, at x = `step`."""
    if page.texts:
        logger.texts(step, page.texts)
    if page.tables:
        logger.tables(step, page.tables)
    if page.images:
        logger.images(step, page.images)
    if page.layout:
        logger.layout(page.layout)
