"""Tuner: a way to choose values for the spaces of a spec, trial after trial."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaopt.deferred import Deferred
from metaopt.space import Space

Point = tuple[float, ...]


@dataclass(frozen=True)
class Tried:
    """One setting, as a number from 0 to 1 for each space, and the share of a whole run that it was trained for."""

    point: Point
    share: float = 1.0


class Task(ABC):
    """What a search is asked to do: choose points for `spaces` so that the loss on validation data becomes small.

    A loss depends only on the point and the share, and is kept in `folder`: asked for again, also by another process or
    after a crash, it costs nothing. A copy of the task in another process reads and writes the same folder.
    """

    # the same for the same question, so that several processes can work at one search
    name: str
    spaces: Mapping[str, Space]
    trials: int
    seed: int
    jobs: int
    folder: Path
    # gradient evaluations of a whole run
    budget: int

    @abstractmethod
    def points(self, count: int) -> list[Point]:
        """Return the first points of the task's own scrambled Sobol sequence."""

    def values(self, point: Sequence[float]) -> dict[str, Any]:
        """Return the values of all spaces at a point, by path."""
        return {path: space.value(u) for (path, space), u in zip(self.spaces.items(), point, strict=True)}

    def begin_process(self) -> None:  # noqa: B027 - nothing is needed by default
        """Make a new process ready for `loss`: it ends with the one that started it."""

    @abstractmethod
    def losses(self, tried: Sequence[Tried]) -> list[float]:
        """Train with each of these, in `jobs` processes, and return the losses; infinity for a run that failed."""

    @abstractmethod
    def loss(self, tried: Tried) -> float:
        """Train with one of them in this process and return the loss."""


class Tuner(Deferred):
    """A way to choose settings. Subclasses declare hyperparameters with `hyper`, as schedules do, and define `run`."""

    @abstractmethod
    def run(self, task: Task) -> list[Tried]:
        """Start `task.trials` settings and return all that was tried, also what was not trained to the end."""
