"""Executors: places where trials run. A plugin offers one by the hook `metaopt_executors`."""

import os
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from metaopt.errors import MetaoptError, ProblemError, did_you_mean
from metaopt.lab.circumstances import THREADS, circumstances, digest
from metaopt.lab.trial import Trial, run_trial
from metaopt.registry import registry
from metaopt.specs.parsing import parse

Result = dict[str, Any]
# the default, which is no plugin: processes of this machine (metaopt.lab.workers)
LOCAL = "local"
RETRIES = 2


@dataclass(frozen=True)
class Task:
    """A trial as it travels: plain values, the plugins that it needs, and the folders in which they are found."""

    key: str
    trial: dict[str, Any]
    plugins: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()

    def run(self, where: str) -> Result:
        """Train in this process, on one thread, and return the result, which says where it was made.

        A trial that raises is a result too. Raises MetaoptError for a plugin that is not found here.
        """
        for path in self.paths:
            if path not in sys.path:
                sys.path.append(path)
        for plugin in self.plugins:
            registry.load_plugin_module(plugin)
        trial = Trial(**self.trial)
        if (
            trial.circumstances
            and _circumstances(trial.problem, trial.spec, trial.device, self.plugins) != trial.circumstances
        ):
            raise ProblemError(
                f"{socket.gethostname()} has other code, versions or data than the driver, so that its results would "
                f"be others: install the same there"
            )
        threads = torch.get_num_threads()
        torch.set_num_threads(THREADS)
        try:
            result = run_trial(trial)
        finally:
            torch.set_num_threads(threads)
        return {**result, **made_here(where)}


def made_here(where: str) -> Result:
    """Return what a result says of the place where it was made: the executor, the machine and the process."""
    return {"where": {"on": where, "host": socket.gethostname(), "process": os.getpid()}}


@cache
def _circumstances(problem: str, spec: str, device: str, plugins: tuple[str, ...]) -> str:
    return digest(circumstances(problem, [parse(spec)], device, plugins))


@dataclass(frozen=True)
class Died:
    """What comes of a task whose worker ended before the result came: killed, or its machine is gone."""

    reason: str


class Executor(ABC):
    """A place where trials run: tasks go in, results come out in any order.

    `address` is what stands behind the colon of `--on NAME:ADDRESS`, `folder` that of the comparison, `jobs` how many
    tasks may run at once if the place has no number of its own. Raises MetaoptError if the place is not there.
    """

    def __init__(self, address: str, folder: Path, jobs: int) -> None:
        self.address = address
        self.folder = folder
        self.jobs = jobs

    @classmethod
    def workers(cls, folder: Path) -> AbstractContextManager[None]:
        """Hold the workers that `metaopt check` needs, where an executor does not start its own."""
        return nullcontext()

    @abstractmethod
    def submit(self, task: Task) -> None:
        """Take a task; do not wait for it."""

    @abstractmethod
    def results(self) -> Iterator[tuple[Task, Result | Died]]:
        """Yield each submitted task once, with what came of it; end when none is left.

        Further tasks may be submitted between two results. Never raise for the sake of one task.
        """

    @abstractmethod
    def cancel(self) -> None:
        """End what still runs, and let go of the place; called once, also after an error."""


def task_of(trial: Trial, plugins: tuple[str, ...]) -> Task:
    """Return a trial as a task; its plugins may be modules in the current folder."""
    return Task(trial.key(), asdict(trial), plugins, (os.getcwd(),) if plugins else ())


def executor_named(text: str, folder: Path, jobs: int) -> Executor:
    """Return the executor that `--on` names, such as `ray` or `ray:auto`. Raises MetaoptError."""
    name, _, address = text.partition(":")
    known = registry.executors()
    if name not in known:
        if elsewhere := registry.offered_elsewhere(name):
            raise ProblemError(f"--on {text}: {elsewhere}")
        raise ProblemError(
            f"--on {text}: no executor is called {name!r}.{did_you_mean(name, [LOCAL, *known])} "
            f"Choose from: {', '.join([LOCAL, *sorted(known)])}"
        )
    try:
        made: Executor = known[name](address, folder, jobs)
    except MetaoptError:
        raise
    except Exception as error:  # whatever a plugin, or the library behind it, raises
        reason = " ".join(str(error).split())
        raise ProblemError(f"--on {text} cannot be used: {type(error).__name__}: {reason:.300}") from error
    return made
