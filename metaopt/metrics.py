"""What is measured, kept on its device until a point is written, and the loggers that points go to."""

import os
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from metaopt.errors import LogError

HyperValue = bool | int | float | str
Value = torch.Tensor | float
Reduce = Literal["mean", "norm"]

# a window that grows beyond this many values is summed up: a 0-dim tensor holds a block of device memory
_FOLD = 256


class Logger(ABC):
    """Where measurements go. One logger serves one run; only rank 0 calls it.

    `place` is what only one run at a time may write to, such as a file's path; None: any number of runs may.
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

    def close(self) -> None:  # noqa: B027  not abstract: most loggers have nothing to let go
        """Write what is left and let go; the default does nothing."""


class Metrics:
    """Collects measurements without waiting for a device, and writes a point every `every` updates (50).

    A point is the mean over the updates since the point before that measured its tag: the loss at every update, what
    costs extra (a norm) at the update of the point alone. `latest()` is of the last update. The last, shorter window
    is written by `close`, or when the program ends. `run` is what `describe` takes; `spec` and `hparams` may be
    callables, asked when the run opens: a checkpoint has been loaded by then.
    """

    def __init__(self, logger: Logger | None = None, *, every: int | None = None, **run: Any) -> None:
        # somebody reads what is measured, also if there is no log
        self._asked = every is not None
        every = 50 if every is None else every
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise LogError(f"log_every must be an integer >= 1 (updates), got {every!r}")
        self.every = every
        self.describe(**run)
        self._now: dict[str, _Parts] = {}  # of the update that is being made
        self._last: dict[str, Value] = {}  # of the last update that measured the tag
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
    ) -> None:
        """Say what the run is, for the logger to hear when it opens."""
        self.tags, self._spec, self._hparams = tuple(tags), spec, hparams

    def wanted(self, update: int, within: int = 1) -> bool:
        """Return whether a point is written after this update (counted from 1), or after one of the next `within - 1`.

        Never, if there is no log and nobody has called `latest`.

        What happens every k updates asks with `within=k`: else only common multiples of k and `every` would be seen.
        """
        return (self._window is not None or self._asked) and -update % self.every < within

    def measure(self, tag: str, value: Value, reduce: Reduce = "mean") -> None:
        """Keep one number under `tag`; a tensor is copied on its device and not read.

        Several of one update are averaged; or they are norms of parts, and "norm" makes the norm of the whole of them.
        """
        self._now.setdefault(tag, _Parts(reduce)).values.append(_kept(tag, value))

    def point(self, tag: str, value: Value, step: int, updates: int) -> None:
        """Keep one number as a point of its own at x = `step`, recorded after so many updates of the run.

        It is written with the next point of the run, or by `close`. Raises LogError.
        """
        kept = _kept(tag, value)
        self._last[tag] = kept
        if self._window is None or rank() != 0:
            return
        if self._window.updates is None or updates < self._window.updates:
            self._open(self._window, updates)
        self._window.points.append((step, tag, kept))

    def drop_update(self) -> None:
        """Forget what was measured for an update that was then skipped."""
        self._now.clear()

    def end_update(self, update: int) -> None:
        """Close the update with this count; write a point where one is due. Raises LogError."""
        if not self._now and self._window is None:
            return
        now = {tag: parts.whole() for tag, parts in self._now.items()}
        self._now.clear()
        self._last.update(now)
        if self._window is None or rank() != 0:
            return
        if self._window.updates is None or update <= self._window.updates:
            self._open(self._window, update - 1)  # for the first time, or the count went back: a checkpoint was loaded
        self._window.add(update, now)
        if self.wanted(update):
            self._window.flush()

    def flush(self) -> None:
        """Write what was measured since the last point: one synchronisation per device."""
        if self._window is not None:
            self._window.flush()

    def latest(self) -> dict[str, float]:
        """Return the last measured value of every tag; several of one update as `measure` says."""
        self._asked = True
        now = {tag: parts.whole() for tag, parts in self._now.items()}
        values = _read({tag: [value] for tag, value in {**self._last, **now}.items()})
        return {tag: number for tag, (number,) in values.items()}

    def close(self) -> None:
        """Write the last, shorter window and close the logger; measuring goes on without one."""
        window, self._window = self._window, None
        if window is not None:
            window.close()

    def _open(self, window: "_Window", step: int) -> None:
        spec = self._spec() if callable(self._spec) else self._spec
        hparams = self._hparams() if callable(self._hparams) else self._hparams
        first = window.updates is None
        window.open(step, self.tags, spec, hparams)
        if first:
            # a program that just ends still writes and closes its log; nothing here is bound to self
            weakref.finalize(self, window.close_at_end)

    def __getstate__(self) -> dict[str, Any]:
        # a copy of a stack is another run: two must not write to one log
        state = dict(vars(self))
        state.update(_spec="", _hparams={}, _now={}, _last={}, _window=None)
        return state


class _Window:
    """What was measured since the last point, and the logger that it goes to."""

    def __init__(self, logger: Logger) -> None:
        self.logger = logger
        self.updates: int | None = None  # None: the logger has not been told of the run
        self._tallies: dict[str, _Tally] = {}
        self.points: list[tuple[int, str, Value]] = []  # that stand for themselves
        self._closed = False

    def open(self, step: int, tags: Sequence[str], spec: str, hparams: Mapping[str, HyperValue]) -> None:
        self._tallies.clear()
        self.points.clear()
        self._occupy()
        self.updates = step
        self._try("could not be opened", self.logger.open, step=step, tags=tags, spec=spec, hparams=dict(hparams))

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

    def add(self, update: int, values: Mapping[str, Value]) -> None:
        self.updates = update
        for tag, value in values.items():
            self._tallies.setdefault(tag, _Tally()).add(value)

    def flush(self) -> None:
        tallies, self._tallies = self._tallies, {}
        points, self.points = self.points, []
        if self.updates is None:
            return
        if tallies:
            sums = _read({tag: tally.values for tag, tally in tallies.items()})
            means = {tag: sum(sums[tag]) / tally.count for tag, tally in tallies.items()}
            self._try(f"could not write update {self.updates}", self.logger.scalars, self.updates, means)
        numbers = _read({str(i): [value] for i, (_, _, value) in enumerate(points)})
        at: dict[int, dict[str, float]] = {}
        for i, (step, tag, _) in enumerate(points):
            at.setdefault(step, {})[tag] = numbers[str(i)][0]
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


class _Parts:
    """What one update measured under one tag: one number, or one for each piece of the parameters."""

    def __init__(self, reduce: Reduce) -> None:
        self.reduce = reduce
        self.values: list[Value] = []

    def whole(self) -> Value:
        """Return the number of the whole update, without waiting for a device."""
        if len(self.values) == 1:
            return self.values[0]
        devices = [value.device for value in self.values if isinstance(value, torch.Tensor)]
        # toward an accelerator: the other way would wait for it
        target = next((device for device in devices if device.type != "cpu"), None)
        values = [
            v if target is None or not isinstance(v, torch.Tensor) else v.to(target, non_blocking=True)
            for v in self.values
        ]
        if self.reduce == "norm":
            return sum(value**2 for value in values) ** 0.5
        return sum(values) / len(values)


class _Tally:
    """The values of one tag since the last point; early ones may have been summed."""

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.count = 0

    def add(self, value: Value) -> None:
        self.values.append(value)
        self.count += 1
        if len(self.values) >= _FOLD:
            sums: dict[torch.device | None, Value] = {}
            for value in self.values:
                device = value.device if isinstance(value, torch.Tensor) else None
                sums[device] = sums[device] + value if device in sums else value
            self.values = list(sums.values())


def _kept(tag: str, value: Value) -> Value:
    if not isinstance(value, torch.Tensor):
        return float(value)
    if value.numel() != 1 or value.is_complex():
        raise LogError(
            f"{tag} is measured as one real number, not as a tensor of shape {tuple(value.shape)} and {value.dtype}: "
            f"reduce it first, for instance by .mean()"
        )
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    # a copy: the caller may write over its tensor before the point is written
    value = value.detach() if value.requires_grad else value
    return (value.reshape(()) if value.dim() else value).to(dtype, copy=True)


def _read(values: Mapping[str, list[Value]]) -> dict[str, list[float]]:
    """Return all values as floats: one stacked tensor, one wait for each device."""
    places: dict[torch.device, list[tuple[str, int]]] = {}
    numbers: dict[str, list[float]] = {}
    for tag, listed in values.items():
        numbers[tag] = [0.0 if isinstance(value, torch.Tensor) else value for value in listed]
        for index, value in enumerate(listed):
            if isinstance(value, torch.Tensor):
                places.setdefault(value.device, []).append((tag, index))
    for where in places.values():
        tensors = [t for tag, index in where if isinstance(t := values[tag][index], torch.Tensor)]
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        for (tag, index), number in zip(where, torch.stack([t.to(dtype) for t in tensors]).tolist(), strict=True):
            numbers[tag][index] = number
    return numbers


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
