"""New processes that start warm: one server imports torch and makes nothing, every process is a fork of it."""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

with contextlib.suppress(ImportError):
    import resource  # not on every system


def called(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a module in a new process; return what it returns, raise what it raises."""
    with ProcessPoolExecutor(1, mp_context=context()) as new:
        return new.submit(function, *arguments).result()


class Command:
    """`metaopt <arguments>`, running in a folder; `largest_file` bounds its files, as a full disk does.

    With `dies_there` the system kills it in the middle of the write that passes that bound.
    """

    def __init__(
        self, arguments: Sequence[str], folder: Path, *, largest_file: int | None = None, dies_there: bool = False
    ) -> None:
        warm = context()
        self._printed = [warm.Pipe(duplex=False) for _ in range(2)]
        ends = [writing for _, writing in self._printed]
        self.process = warm.Process(target=_run, args=(list(arguments), str(folder), largest_file, dies_there, *ends))
        self.process.start()
        for writing in ends:
            writing.close()

    def running(self) -> bool:
        """Tell whether the process has not ended yet."""
        return self.process.is_alive()

    def kill(self, number: int | None = None) -> None:
        """Send a signal, by default the one that cannot be caught, and wait for that one's effect."""
        if number is None:
            self.process.kill()
            self.process.join()
        else:
            os.kill(self.process.pid or 0, number)

    def end(self) -> tuple[int, str, str]:
        """Wait for the end; return the exit status, the output and the errors."""
        self.process.join(240)
        assert self.process.exitcode is not None, "the command did not end"
        out, errors = (_all(reading) for reading, _ in self._printed)
        return self.process.exitcode, out, errors


def run(arguments: Sequence[str], folder: Path, **how: Any) -> tuple[int, str, str]:
    """Run a command to its end; return its exit status, its output and its errors."""
    return Command(arguments, folder, **how).end()


def context() -> ForkServerContext:
    """Return how processes start, after the server has imported all that they need: it looks for modules of its own."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["warmed"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()
    return found


def fresh_streams() -> None:
    """Let Python write where the process writes now: the server's own streams remember where its output went."""
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))


def _all(reading: Connection) -> str:
    with os.fdopen(os.dup(reading.fileno()), "rb") as file:
        return file.read().decode()


def _run(
    arguments: list[str], folder: str, largest_file: int | None, dies: bool, out: Connection, errors: Connection
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where these tests run under nohup or some CI
    os.chdir(folder)
    os.dup2(out.fileno(), 1)
    os.dup2(errors.fileno(), 2)
    fresh_streams()
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
        if dies:  # Python ignores the signal, and gets an OSError instead
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    from metaopt.cli import main

    main(arguments)
