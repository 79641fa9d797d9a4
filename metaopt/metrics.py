"""What is measured, kept on its device until a point is written, and the loggers that points go to."""

import os
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from metaopt.errors import LogError

HyperValue = bool | int | float | str
Value = torch.Tensor | float

# a window that grows beyond this many values is summed up: a 0-dim tensor holds a block of device memory
_FOLD = 256


class Logger(ABC):
    """Where measurements go. One logger serves one run; only rank 0 calls it."""

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
    """Collects measurements without waiting for a device, and writes a point every `every` updates.

    A point is the mean of what was measured under its tag since the point before; `latest()` is of the last update.
    `run` is what `describe` takes; `spec` and `hparams` may be callables, asked when the run opens: a checkpoint has
    been loaded by then.
    """

    def __init__(self, logger: Logger | None = None, *, every: int = 50, **run: Any) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise LogError(f"log_every={every!r} is not a number of updates: give an integer from 1 up")
        self.every = every
        self._logger = logger
        self.describe(**run)
        self._now: dict[str, list[Value]] = {}  # of the update that is being made
        self._window: dict[str, _Tally] = {}  # of the updates since the last point
        self._last: dict[str, list[Value]] = {}  # of the last update that measured the tag
        self._updates: int | None = None  # None: the logger has not been told of the run

    @property
    def logger(self) -> Logger | None:
        return self._logger

    def attach(self, logger: Logger | None) -> None:
        """Write to `logger` from the next update on; None stops writing."""
        self._logger, self._updates = logger, None
        self._window.clear()

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

        What happens every k updates asks with `within=k`: else only common multiples of k and `every` would be seen.
        """
        return -update % self.every < within

    def measure(self, tag: str, value: Value) -> None:
        """Keep one number under `tag`; a tensor is copied on its device and not read."""
        self._now.setdefault(tag, []).append(_kept(tag, value))

    def drop_update(self) -> None:
        """Forget what was measured for an update that was then skipped."""
        self._now.clear()

    def end_update(self, update: int) -> None:
        """Close the update with this count; write a point where one is due. Raises LogError."""
        if not self._now and self._logger is None:
            return
        now, self._now = self._now, {}
        self._last.update(now)
        if not self._writes():
            return
        if self._updates is None or update <= self._updates:  # a count that went back: a checkpoint was loaded
            self._open(update - 1)
        self._updates = update
        for tag, values in now.items():
            self._window.setdefault(tag, _Tally()).add(values)
        if self.wanted(update):
            self.flush()

    def flush(self) -> None:
        """Write what was measured since the last point: one synchronisation per device."""
        window, self._window = self._window, {}
        if not window or self._logger is None or self._updates is None:
            return
        sums = _read({tag: tally.values for tag, tally in window.items()})
        means = {tag: sum(sums[tag]) / tally.count for tag, tally in window.items()}
        try:
            self._logger.scalars(self._updates, means)
        except LogError:
            raise
        except OSError as error:
            raise LogError(f"{type(self._logger).__name__} could not write update {self._updates}: {error}") from error

    def latest(self) -> dict[str, float]:
        """Return the last measured value of every tag, the mean where one update measured several."""
        values = _read({**self._last, **self._now})
        return {tag: sum(numbers) / len(numbers) for tag, numbers in values.items()}

    def close(self) -> None:
        """Write the last, shorter window and close the logger; measuring goes on without one."""
        if self._logger is None:
            return
        try:
            self.flush()
        finally:
            logger, self._logger = self._logger, None
            logger.close()

    def _writes(self) -> bool:
        return self._logger is not None and rank() == 0

    def _open(self, step: int) -> None:
        assert self._logger is not None
        spec = self._spec() if callable(self._spec) else self._spec
        hparams = self._hparams() if callable(self._hparams) else self._hparams
        self._window.clear()
        try:
            self._logger.open(step=step, tags=self.tags, spec=spec, hparams=dict(hparams))
        except LogError:
            raise
        except OSError as error:
            raise LogError(f"{type(self._logger).__name__} could not be opened: {error}") from error
        if self._updates is None:
            # a program that just ends still closes its log; `close` is bound to the logger, never to self
            weakref.finalize(self, self._logger.close)

    def __getstate__(self) -> dict[str, Any]:
        # a copy of a stack is another run: two must not write to one log
        state = dict(vars(self))
        state.update(_logger=None, _spec="", _hparams={}, _now={}, _window={}, _last={}, _updates=None)
        return state


class _Tally:
    """The values of one tag since the last point; early ones may have been summed."""

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.count = 0

    def add(self, values: list[Value]) -> None:
        self.values += values
        self.count += len(values)
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
    return value.detach().reshape(()).to(dtype, copy=True)


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
        f"log={log!r} is nothing to write to: give a directory, a SummaryWriter, a Logger such as "
        f"metaopt.jsonl('run.jsonl'), or None"
    )
