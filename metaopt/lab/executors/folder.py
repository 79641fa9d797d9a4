"""The executor `folder`: workers on any machine that sees the folder take tasks by leases that they renew.

    OUT/tasks/<key>.json        a task, written whole; it goes when its result is there
    OUT/tasks/<key>.lease       made by the one worker that runs it, who touches it again and again
    OUT/tasks/<key>.result      what came of it, written whole

A lease that its holder has not renewed for a while is taken over: renamed by exactly one worker. Ages are measured
against a file that the worker itself has just touched there, so that clocks need not agree.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from metaopt.errors import LogError
from metaopt.hooks import hookimpl
from metaopt.lab.executors import Died, Executor, Result, Task
from metaopt.lab.holding import scratch_of
from metaopt.lab.trial import Trial
from metaopt.lab.workers import process_context, store

NAME = "folder"
TASKS, TRIALS = "tasks", "trials"
# seconds without a sign of life after which a lease is taken over
LEASE = 30.0
# of workers that are there to be killed
SHORT = 2.0
# seconds between two looks into the folder
LOOK = 0.2
# of a result: its time is not shown, because others may have run beside it
MANY = 2


class Folder(Executor):
    """Puts tasks into the comparison's folder, where `metaopt work OUT` takes them, and reads the results there."""

    def __init__(self, address: str, folder: Path, jobs: int) -> None:
        super().__init__(address, folder, jobs)
        self._tasks = folder / TASKS
        self._waiting: dict[str, Task] = {}
        try:
            for name in (TASKS, TRIALS):
                (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LogError(f"tasks cannot be written to {folder}: {error.strerror or error}") from None

    @classmethod
    @contextlib.contextmanager
    def workers(cls, folder: Path) -> Iterator[None]:
        """Start three workers: one is killed, and another then sees its lease."""
        context = process_context()
        started = [context.Process(target=_work, args=(folder, SHORT), daemon=True) for _ in range(3)]
        for process in started:
            process.start()
        try:
            yield
        finally:
            for process in started:
                process.kill()
                process.join()

    def submit(self, task: Task) -> None:
        self._waiting[task.key] = task
        # one that an earlier driver has submitted may be running: it stays
        if not _result(self._tasks, task.key).exists():
            _write(self._tasks / f"{task.key}.json", asdict(task))

    def results(self) -> Iterator[tuple[Task, Result | Died]]:
        while self._waiting:
            done = [key for key in self._waiting if _result(self._tasks, key).exists()]
            for key in done:
                found = _read(_result(self._tasks, key))
                for name in (f"{key}.json", f"{key}.result"):
                    (self._tasks / name).unlink(missing_ok=True)
                task = self._waiting.pop(key)
                died = None if found is None else found.get("died")
                yield task, Died(died or "its result cannot be read") if died or found is None else found
            if not done:
                time.sleep(LOOK)

    def cancel(self) -> None:
        for key in self._waiting:
            (self._tasks / f"{key}.json").unlink(missing_ok=True)


class Worker:
    """Takes tasks from a folder, one after the other."""

    def __init__(self, out: Path, lease: float = LEASE) -> None:
        self.tasks, self.trials = out / TASKS, out / TRIALS
        self.lease = lease
        self.name = f"{socket.gethostname()}-{os.getpid()}"
        self._clock = self.tasks / f"{self.name}.clock"

    def run_one(self) -> str | None:
        """Run the next task that nobody runs; return its key, or None if there is none."""
        if not self.tasks.is_dir():
            return None
        for path in sorted(self.tasks.glob("*.json")):
            key = path.stem
            if _result(self.tasks, key).exists() or not self._take(key):
                continue
            lease = self.tasks / f"{key}.lease"
            try:
                # between the look and the lease another worker may have finished it
                task = None if _result(self.tasks, key).exists() else _task(path)
                if task is not None:
                    with self._renewing(lease):
                        result = task.run(NAME)
                    # kept, also if no driver is there: the next one finds it, wherever it lets trials run
                    store(result, self.trials, MANY, Trial(**task.trial))
                    _write(_result(self.tasks, key), result)
                    return key
            finally:
                if _holder(lease) == self.name:
                    lease.unlink(missing_ok=True)
        return None

    def work(self, idle: float) -> int:
        """Run tasks until there has been none for so many seconds; return how many were run."""
        done, since = 0, time.monotonic()
        try:
            while time.monotonic() - since < idle:
                if self.run_one() is None:
                    time.sleep(LOOK)
                else:
                    done, since = done + 1, time.monotonic()
        finally:
            self._clock.unlink(missing_ok=True)
        return done

    def _take(self, key: str) -> bool:
        lease = self.tasks / f"{key}.lease"
        try:
            handle = os.open(lease, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return self._take_over(key, lease)
        except OSError as error:
            raise LogError(f"{lease} cannot be written: {error.strerror or error}") from None
        with os.fdopen(handle, "w") as file:
            file.write(self.name)
        return True

    def _take_over(self, key: str, lease: Path) -> bool:
        """Take a lease away whose holder has not renewed it: the driver learns that the task died."""
        try:
            self._clock.touch()
            age = self._clock.stat().st_mtime - lease.stat().st_mtime
            if age < self.lease:
                return False
            # of several workers that see it, one renames it
            taken = lease.with_suffix(f".{self.name}")
            lease.rename(taken)
            if self._clock.stat().st_mtime - taken.stat().st_mtime < self.lease:
                taken.rename(lease)  # of another worker, who has just taken it
                return False
        except FileNotFoundError:
            return False
        before = taken.read_text() or "a worker"
        taken.unlink(missing_ok=True)
        _write(_result(self.tasks, key), {"died": f"{before} gave no sign of life for {age:.0f} s"})
        return False

    @contextlib.contextmanager
    def _renewing(self, lease: Path) -> Iterator[None]:
        done = threading.Event()

        def renew() -> None:
            while not done.wait(self.lease / 5):
                with contextlib.suppress(OSError):
                    os.utime(lease)

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _work(folder: Path, lease: float) -> None:
    Worker(folder, lease).work(idle=600.0)


def _result(tasks: Path, key: str) -> Path:
    return tasks / f"{key}.result"


def _holder(lease: Path) -> str:
    try:
        return lease.read_text()
    except OSError:
        return ""


def _task(path: Path) -> Task | None:
    found = _read(path)
    if found is None:
        return None
    return Task(found["key"], found["trial"], tuple(found["plugins"]), tuple(found["paths"]))


def _read(path: Path) -> Result | None:
    try:
        found: Result = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found


def _write(path: Path, value: Result) -> None:
    scratch = scratch_of(path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}"))
    try:
        scratch.write_text(json.dumps(value))
        scratch.replace(path)
    except OSError as error:
        raise LogError(f"{path} cannot be written: {error.strerror or error}") from None


@hookimpl
def metaopt_executors() -> dict[str, type[Executor]]:
    return {NAME: Folder}
