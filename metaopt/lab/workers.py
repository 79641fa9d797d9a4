"""Running trials, in this process or in others that end when it ends; each result is on disk before it counts."""

import json
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from metaopt.errors import LogError, ProblemError
from metaopt.lab.circumstances import THREADS
from metaopt.lab.executors import LOCAL, RETRIES, made_here
from metaopt.lab.holding import scratch_of
from metaopt.lab.trial import Trial, failed, run_trial
from metaopt.registry import registry

Result = dict[str, Any]

# without any result between: nothing can be run here
KILLED_IN_A_ROW = 8
KILLED = "its process was killed {} times from outside, most likely for want of memory"


class Workers:
    """Runs trials in this process, or in `jobs` others that start when there is something to do and end on leaving.

    Left by an exception, a Ctrl-C among them, it ends at once what still runs.
    """

    def __init__(
        self,
        folder: Path,
        jobs: int,
        plugins: Sequence[str] = (),
        retry_failed: bool = False,
        retries: int = RETRIES,
    ) -> None:
        self.folder = folder.absolute()  # a process may begin in another one
        self.jobs = jobs
        self.plugins = tuple(plugins)
        self.retry_failed = retry_failed
        self.tries = retries + 1
        self._pool: ProcessPoolExecutor | None = None
        self._others: set[Any] = set()
        self._threads = torch.get_num_threads()

    def __enter__(self) -> "Workers":
        if self.jobs == 1:
            torch.set_num_threads(THREADS)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        torch.set_num_threads(self._threads)
        self._end_pool(patiently=kind is None)

    def results(self, trials: Iterable[Trial]) -> Iterator[tuple[Trial, Result]]:
        """Yield each trial with its result as it comes; one that lies in the folder is read, not made again.

        A trial that raises is a result, and so is one whose process was killed at each of its tries. Raises LogError.
        """
        missing = []
        for trial in trials:
            found = stored(trial, self.folder)
            if found is None or (self.retry_failed and found["failed"]):
                missing.append(trial)
            else:
                yield trial, found
        if self.jobs == 1:
            for trial in missing:
                yield trial, _run_and_store(trial, self.folder, 1)
        elif missing:
            yield from self._elsewhere(missing)

    def _elsewhere(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, Result]]:
        waiting, suspects = deque(trials), deque[Trial]()
        killed: Counter[Trial] = Counter()
        running: dict[Future[Result], Trial] = {}
        in_a_row = 0
        while waiting or suspects or running:
            try:
                self._submit(waiting, suspects, running)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    in_a_row = 0
                    yield running.pop(future), result
            except BrokenProcessPool:
                in_a_row += 1
                if in_a_row > KILLED_IN_A_ROW:
                    raise ProblemError(
                        f"training processes are killed as soon as they start, {in_a_row} in a row, most likely for "
                        f"want of memory: give fewer --jobs than {self.jobs}; the same command goes on "
                        "from what is done"
                    ) from None
                # one of these was it: each is tried again by itself
                for trial in running.values():
                    done = stored(trial, self.folder)
                    if done is not None and not done["failed"]:
                        yield trial, done
                        continue
                    killed[trial] += 1
                    if killed[trial] < self.tries:
                        suspects.append(trial)
                    else:
                        lost = {**failed(trial, KILLED.format(self.tries)), **made_here(LOCAL)}
                        yield trial, store(lost, self.folder, self.jobs, trial)
                running.clear()
                self._end_pool()

    def _submit(self, waiting: deque[Trial], suspects: deque[Trial], running: dict[Future[Result], Trial]) -> None:
        """Keep all processes busy, or one of them with a trial that may have got another one killed."""
        source, most = (suspects, 1) if suspects else (waiting, 2 * self.jobs)
        while source and len(running) < most:
            if self._pool is None:
                self._others = set(multiprocessing.active_children())
                self._pool = ProcessPoolExecutor(
                    self.jobs, process_context(), initializer=begin_process, initargs=(self.plugins,)
                )
            future = self._pool.submit(_run_and_store, source[0], self.folder, self.jobs)
            running[future] = source.popleft()

    def _end_pool(self, patiently: bool = False) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=patiently, cancel_futures=True)
            for worker in set(multiprocessing.active_children()) - self._others:
                worker.kill()
                worker.join()
            self._pool = None


def stored(trial: Trial, folder: Path) -> dict[str, Any] | None:
    """Return the result of a trial that was run before, or None; a file that holds something else is none."""
    try:
        found = json.loads(_file(trial, folder).read_text())
    except (FileNotFoundError, ValueError):
        return None
    whole = isinstance(found, dict) and {"validation", "test", "failed", "jobs"} <= found.keys()
    return found if whole else None


def _file(trial: Trial, folder: Path) -> Path:
    return folder / f"{trial.key()}.json"


def _run_and_store(trial: Trial, folder: Path, jobs: int) -> dict[str, Any]:
    return store({**run_trial(trial), **made_here(LOCAL)}, folder, jobs, trial)


def store(result: Result, folder: Path, jobs: int, trial: Trial) -> dict[str, Any]:
    """Write a result into the folder, whole or not at all, and return it. Raises LogError."""
    # read back: the same types whether a result is new or old
    text = json.dumps({**result, "jobs": jobs})
    path = _file(trial, folder)
    scratch = scratch_of(path.with_suffix(f".{os.getpid()}"))
    try:
        scratch.write_text(text)
        scratch.replace(path)
    except OSError as error:
        with suppress(OSError):  # a full disk is no fuller for it
            scratch.unlink(missing_ok=True)
        raise LogError(f"a result cannot be written to {folder}: {error.strerror or error}") from None
    found: dict[str, Any] = json.loads(text)
    return found


def process_context() -> Any:
    """Return how processes start: never by a fork of this one, whose threads they would inherit half."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # imported once for all; the first optimizer would import torch._dynamo in each
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    return context


def begin_process(plugins: Sequence[str]) -> None:
    """Make a worker ready: plugins, one thread, and an end with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent alone hears the keyboard, and ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(THREADS)
    for plugin in plugins:
        registry.load_plugin_module(plugin)


def _end_with_parent() -> None:
    # a parent that was killed cannot say goodbye; its end of a pipe closes all the same
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
