"""New processes that start warm: one server imports torch and makes nothing, every process is a fork of it."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
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


class New:
    """A function of a module that is called in a new process, in a folder; what it prints is kept.

    `path` has more places to import from. With `own_server` the processes that it starts come from a server of its own,
    as those of a command on a terminal do. `largest_file` bounds the files that it writes, as a full disk
    does; with `dies_there` the system kills it in the middle of the write that passes that bound.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        folder: Path,
        path: Sequence[Path] = (),
        own_server: bool = False,
        largest_file: int | None = None,
        dies_there: bool = False,
    ) -> None:
        warm = context()
        self._printed = [warm.Pipe(duplex=False) for _ in range(2)]
        ends = [writing for _, writing in self._printed]
        places = [str(place) for place in path]
        how = (str(folder), places, own_server, largest_file, dies_there)
        self.process = warm.Process(target=_call, args=(function, arguments, *how, *ends))
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
        texts = ["", ""]

        def read(number: int) -> None:
            texts[number] = _all(self._printed[number][0])

        readers = [threading.Thread(target=read, args=(number,), daemon=True) for number in range(2)]
        for reader in readers:  # a process waits until what it prints is read
            reader.start()
        self.process.join(240)
        assert self.process.exitcode is not None, "the process did not end"
        for reader in readers:
            reader.join(10)
        return self.process.exitcode, texts[0], texts[1]


class Command(New):
    """`metaopt <arguments>`, running in a folder."""

    def __init__(self, arguments: Sequence[str], folder: Path, **how: Any) -> None:
        super().__init__(_metaopt, list(arguments), folder=folder, **how)


def run(arguments: Sequence[str], folder: Path, **how: Any) -> tuple[int, str, str]:
    """Run a command to its end; return its exit status, its output and its errors."""
    return Command(arguments, folder, **how).end()


def printed(function: Callable[..., Any], *arguments: Any, **how: Any) -> str:
    """Call a function of a module in a new process; return what it printed. It must succeed."""
    status, out, errors = New(function, *arguments, **how).end()
    assert status == 0, f"{arguments}\n{out}\n{errors}"
    return out


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


def _metaopt(arguments: list[str]) -> None:
    from metaopt.cli import main

    main(arguments)


def _call(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    folder: str,
    path: list[str],
    own_server: bool,
    largest_file: int | None,
    dies: bool,
    out: Connection,
    errors: Connection,
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where these tests run under nohup or some CI
    os.chdir(folder)
    sys.path[:0] = path
    os.environ["COLUMNS"] = "200"
    os.dup2(out.fileno(), 1)
    os.dup2(errors.fileno(), 2)
    fresh_streams()
    if not own_server:
        _fork_workers_of_the_same_server()
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
        if dies:  # Python ignores the signal, and gets an OSError instead
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    function(*arguments)


def _fork_workers_of_the_same_server() -> None:
    """Have the processes that this one starts come from its own server, which Python does not find from a fork."""
    server = forkserver._forkserver
    assert server._forkserver_address, "this process is no fork of a server"
    server.ensure_running = lambda: None
