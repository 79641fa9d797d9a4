"""What is measured, kept on its device until a point is written, and the loggers that points go to.

A point of a CUDA device is copied behind the device's work, and written at a later update, when the copy is there.
"""

import os
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from metaopt.errors import LogError
from metaopt.logger import Histogram, HyperValue, Logger, RunPage, show_page, takes_pages
from metaopt.measurements import OfBins, OfTensors, Parts, Point, Reduce, Tally, Value, kept, read


class Metrics:
    """Collects measurements without waiting for a device, and writes a point every `every` updates (50).

    A point is the mean over the updates since the point before that measured its tag: the loss at every update, what
    costs extra (a norm) at the update of the point alone. From CUDA it is written when its copy is there, any other
    device is waited for. `latest()` is of the last update that measured a tag. The last, shorter window is written by
    `close`, or when the program ends. `run` is what `describe` takes; `spec` and `hparams` may be callables, asked
    when the run opens: a checkpoint has been loaded by then.
    """

    def __init__(
        self, logger: Logger | None = None, *, every: int | None = None, asked: bool = False, **run: Any
    ) -> None:
        # somebody reads what is measured, also if there is no log: here, or on the rank that writes it, because what is
        # measured over all shards is measured by all ranks
        self._asked = asked or every is not None
        every = 50 if every is None else every
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise LogError(f"log_every must be an integer >= 1 (updates), got {every!r}")
        self.every = every
        self.describe(**run)
        self._now: dict[str, Parts] = {}  # of the update that is being made
        # of earlier steps that the update is gathered from, and the tags that are kept of those
        self._gathered: dict[str, Parts] = {}
        self._recorded: set[str] = set()
        self._now_many: dict[str, OfTensors | OfBins] = {}
        self._last: dict[str, Value] = {}  # of the last update that measured the tag
        self._last_many: dict[str, OfTensors | OfBins] = {}
        self._window: _Window | None = None  # of the updates since the last point
        self.attach(logger)

    @property
    def logger(self) -> Logger | None:
        return None if self._window is None else self._window.logger

    def attach(self, logger: Logger | None) -> None:
        """Write to `logger` from the next update on; None stops writing."""
        self._window = None if logger is None else _Window(logger)

    def describe(
        self,
        *,
        tags: Iterable[str] = (),
        spec: str | Callable[[], str] = "",
        hparams: Mapping[str, HyperValue] | Callable[[], Mapping[str, HyperValue]] = dict,
        page: Callable[[], RunPage] = RunPage,
    ) -> None:
        """Say what the run is, for the logger to hear when it opens; `page` is made only for one that shows it."""
        self.tags, self._spec, self._hparams, self._page = tuple(tags), spec, hparams, page

    def ask(self) -> None:
        """Measure from now on, also if there is no log."""
        self._asked = True

    def wanted(self, update: int, within: int = 1) -> bool:
        """Return whether a point is written after this update (counted from 1), or after one of the next `within - 1`.

        Never, if nobody reads it: there is no log, `latest` was not called, and `every` was not given.

        What happens every k updates asks with `within=k`: else only common multiples of k and `every` would be seen.
        """
        return (self._window is not None or self._asked) and -update % self.every < within

    def measure(self, tag: str, value: Value, reduce: Reduce = "mean") -> None:
        """Keep one number under `tag`; a tensor is copied on its device and not read.

        Several of one update are averaged; or they are norms of parts, and "norm" makes the norm of the whole of them.
        """
        number = kept(tag, value)
        self._now.setdefault(tag, Parts(reduce)).values.append(number)

    def record(self, tag: str, value: Value) -> None:
        """Keep one number as `measure` does; it counts also for a step that is gathered into a later update."""
        self.measure(tag, value)
        self._recorded.add(tag)

    def measure_tensors(self, tag: str, names: Sequence[str], values: torch.Tensor, most: int | None = None) -> None:
        """Keep one number for each of many tensors, logged as `<tag>/<name>`: the last ones before a point are written.

        With `most`, only so many of the largest and of the smallest are written. `values` is copied and not read.
        """
        self._now_many[tag] = OfTensors(names, values, most)

    def measure_histogram(self, tag: str, edges: Sequence[float], counts: torch.Tensor) -> None:
        """Keep a histogram: how many numbers lie between each two edges. The last one before a point is written."""
        self._now_many[tag] = OfBins(edges, counts)

    def point(self, tag: str, value: Value, step: int, updates: int) -> None:
        """Keep one number as a point of its own at x = `step`, recorded after so many updates of the run.

        It is written with the next point of the run, by `write_points`, `flush` or `close`. Raises LogError.
        """
        number = kept(tag, value)
        self._last[tag] = number
        if self._window is None or rank() != 0:
            return
        if self._window.updates is None or updates < self._window.updates:
            self._open(self._window, updates)
        self._window.points.append((step, tag, number))

    def write_points(self) -> None:
        """Write points that are under way and values that are points of their own; waits for both."""
        if self._window is not None:
            self._window.write_points()

    def drop_update(self, *, gathered: bool = False) -> None:
        """Forget what was measured for an update that was skipped or failed; `gathered`: at its earlier steps, too."""
        self._now.clear()
        self._now_many.clear()
        if gathered:
            self._gathered.clear()

    def gather_step(self) -> None:
        """Keep what was recorded at a step that is gathered into a later update; forget what else was measured."""
        for tag in self._recorded.intersection(self._now):
            self._gathered.setdefault(tag, Parts("mean")).values.extend(self._now[tag].values)
        self._now.clear()
        self._now_many.clear()

    def _measured(self) -> dict[str, Value]:
        """Return one number for each tag of the update; what earlier steps of it recorded counts."""
        parts = dict(self._now)
        for tag, earlier in self._gathered.items():
            parts[tag] = Parts("mean")
            parts[tag].values += [*earlier.values, *(self._now[tag].values if tag in self._now else ())]
        return {tag: part.whole() for tag, part in parts.items()}

    def end_update(self, update: int) -> None:
        """Close the update with this count; write a point where one is due. Raises LogError."""
        if not self._now and not self._now_many and not self._gathered and self._window is None:
            return
        now = self._measured()
        many = dict(self._now_many)
        self._now.clear()
        self._now_many.clear()
        self._gathered.clear()
        self._last.update(now)
        self._last_many.update(many)
        if self._window is None or rank() != 0:
            return
        if self._window.updates is None or update <= self._window.updates:
            self._open(self._window, update - 1)  # for the first time, or the count went back: a checkpoint was loaded
        self._window.add(update, now, many)
        if self._window.under_way:
            self._window.write_what_is_read(wait=False)
        if self.wanted(update):
            self._window.flush(wait=False)

    def flush(self) -> None:
        """Write what was measured since the last point: one synchronisation per device."""
        if self._window is not None:
            self._window.flush()

    def latest(self) -> dict[str, float]:
        """Return the last measured value of every tag; several of one update as `measure` says."""
        self.ask()
        now = self._measured()
        many = {tag: found for tag, found in self._last_many.items() if isinstance(found, OfTensors)}
        values = read({tag: [value] for tag, value in {**self._last, **now}.items()})
        numbers = read({tag: [found.values] for tag, found in many.items()})
        latest = {tag: number for tag, (number,) in values.items()}
        for tag, found in many.items():
            latest.update({f"{tag}/{name}": number for name, number in found.shown(numbers[tag], {}).items()})
        return latest

    def close(self) -> None:
        """Write the last, shorter window and close the logger; measuring goes on without one."""
        window, self._window = self._window, None
        if window is not None:
            window.close()

    def _open(self, window: "_Window", step: int) -> None:
        spec = self._spec() if callable(self._spec) else self._spec
        hparams = self._hparams() if callable(self._hparams) else self._hparams
        first = window.updates is None
        window.open(step, self.tags, spec, hparams, self._page)
        if first:
            # a program that just ends still writes and closes its log; nothing here is bound to self
            weakref.finalize(self, window.close_at_end)

    def __getstate__(self) -> dict[str, Any]:
        # a copy of a stack is another run: two must not write to one log
        state = dict(vars(self))
        state.update(_spec="", _hparams={}, _page=RunPage, _now={}, _last={}, _window=None)
        state.update(_gathered={}, _now_many={}, _last_many={})
        return state


class _Window:
    """What was measured since the last point, and the logger that it goes to."""

    def __init__(self, logger: Logger) -> None:
        self.logger = logger
        self.updates: int | None = None  # None: the logger has not been told of the run
        self._tallies: dict[str, Tally] = {}
        self._many: dict[str, OfTensors | OfBins] = {}
        self._names: dict[str, dict[str, None]] = {}  # of tensors that were shown, by tag
        self.points: list[tuple[int, str, Value]] = []  # that stand for themselves
        self.under_way: list[Point] = []  # to be written, in this order, when their numbers are in main memory
        self._closed = False

    def open(
        self,
        step: int,
        tags: Sequence[str],
        spec: str,
        hparams: Mapping[str, HyperValue],
        page: Callable[[], RunPage],
    ) -> None:
        self._tallies.clear()
        self._many.clear()
        self.points.clear()
        self.write_what_is_read()
        self._occupy()
        self.updates = step
        self._try("could not be opened", self.logger.open, step=step, tags=tags, spec=spec, hparams=dict(hparams))
        if takes_pages(self.logger):
            self._try("could not be opened", show_page, self.logger, step, page())

    def _occupy(self) -> None:
        """Raise LogError if another run of this program is writing where this one is to write."""
        place = self.logger.place
        if place is None:
            return
        holder = _PLACES.setdefault(place, self)
        if holder is not self and not holder._closed:
            raise LogError(
                f"another stack of this program writes to {place}, and the points of the two would mix: "
                f"give each a place of its own, or close the other first, opt.close()"
            )
        _PLACES[place] = self

    def add(self, update: int, values: Mapping[str, Value], many: "Mapping[str, OfTensors | OfBins]") -> None:
        self.updates = update
        self._many.update(many)
        for tag, value in values.items():
            self._tallies.setdefault(tag, Tally()).add(value)

    def flush(self, *, wait: bool = True) -> None:
        """Write what was added since the last point; without `wait`, from CUDA as soon as it is there."""
        tallies, self._tallies = self._tallies, {}
        alone, self.points = self.points, []
        many, self._many = self._many, {}
        if self.updates is not None:
            self.under_way.append(Point(self.updates, tallies, many, alone))
            self.write_what_is_read(wait=wait)

    def write_what_is_read(self, *, wait: bool = True) -> None:
        """Write the points on their way whose numbers have come; all of them with `wait`."""
        while self.under_way and (wait or self.under_way[0].reading.is_ready()):
            point = self.under_way.pop(0)
            numbers = point.reading.numbers()
            means = {tag: sum(numbers["mean", tag]) / tally.count for tag, tally in point.tallies.items()}
            histograms = {}
            for tag, found in point.many.items():
                if isinstance(found, OfBins):
                    histograms[tag] = Histogram(found.edges, tuple(numbers["many", tag]))
                else:
                    shown = found.shown(numbers["many", tag], self._names.setdefault(tag, {}))
                    means.update({f"{tag}/{name}": number for name, number in shown.items()})
            if means:
                self._try(f"could not write update {point.update}", self.logger.scalars, point.update, means)
            if histograms:
                self._try(f"could not write update {point.update}", self.logger.histograms, point.update, histograms)
            self._write_alone(point.alone, [numbers["alone", i][0] for i in range(len(point.alone))])

    def write_points(self) -> None:
        self.write_what_is_read()
        points, self.points = self.points, []
        numbers = read({i: [value] for i, (_, _, value) in enumerate(points)})
        self._write_alone(points, [numbers[i][0] for i in range(len(points))])

    def _write_alone(self, points: Sequence[tuple[int, str, Value]], numbers: Sequence[float]) -> None:
        at: dict[int, dict[str, float]] = {}
        for (step, tag, _), number in zip(points, numbers, strict=True):
            at.setdefault(step, {})[tag] = number
        for step, values in at.items():
            self._try(f"could not write step {step}", self.logger.scalars, step, values)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            self.flush()
        finally:
            self.logger.close()

    def close_at_end(self) -> None:
        try:
            self.close()
        except Exception as error:  # whatever it is, nobody is left to catch it
            print(f"metaopt: {error}", file=sys.stderr)

    def _try(self, what: str, call: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        try:
            call(*args, **kwargs)
        except LogError:
            raise
        except OSError as error:
            raise LogError(f"{type(self.logger).__name__} {what}: {error}") from error


# which run writes where, in this process
_PLACES: weakref.WeakValueDictionary[Any, _Window] = weakref.WeakValueDictionary()


def rank() -> int:
    """Return this process's rank, 0 where nothing is distributed."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0


def as_logger(log: Any, directory_logger: Callable[[Any], Logger]) -> Logger | None:
    """Return the logger for what a user gave as `log=`, or None.

    `directory_logger` makes one from a directory or a SummaryWriter; ranks other than 0 make no directory.
    Raises LogError.
    """
    if log is None or isinstance(log, Logger):
        return log
    # whoever made a SummaryWriter has imported its module; metaopt itself need not import TensorBoard to ask
    writers = sys.modules.get("torch.utils.tensorboard.writer")
    if isinstance(log, str | os.PathLike) or (writers is not None and isinstance(log, writers.SummaryWriter)):
        return directory_logger(log) if rank() == 0 else None
    raise LogError(
        f"log must be a directory, a SummaryWriter, a Logger such as metaopt.jsonl('run.jsonl'), or None, "
        f"got {log!r:.60}"
    )
