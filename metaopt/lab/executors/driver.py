"""The driver: gives the trials that are missing to an executor, and runs those that died again."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from metaopt.lab.executors import Died, Executor, Result, Task, executor_named, task_of
from metaopt.lab.trial import Trial, failed
from metaopt.lab.workers import store, stored


class Driver:
    """Runs trials on an executor; every result is on disk before it counts.

    A task that died is submitted again, `retries` times at most; then it is a result that says so. Left by an
    exception, a Ctrl-C among them, it cancels what still runs.
    """

    def __init__(
        self, on: str, folder: Path, jobs: int, plugins: tuple[str, ...], retries: int, retry_failed: bool = False
    ) -> None:
        self.on = on
        self.folder = folder.absolute()
        self.jobs = jobs
        self.plugins = plugins
        self.retries = retries
        self.retry_failed = retry_failed
        self._executor: Executor | None = None

    def __enter__(self) -> "Driver":
        self._executor = executor_named(self.on, self.folder.parent, self.jobs)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._executor is not None:
            self._executor.cancel()

    def results(self, trials: Iterable[Trial]) -> Iterator[tuple[Trial, Result]]:
        """Yield each trial with its result as it comes; one that lies in the folder is read, not made again."""
        assert self._executor is not None
        missing: dict[str, Trial] = {}
        for trial in trials:
            found = stored(trial, self.folder)
            if found is None or (self.retry_failed and found["failed"]):
                missing[trial.key()] = trial
            else:
                yield trial, found
        for trial in missing.values():
            self._executor.submit(task_of(trial, self.plugins))
        died: Counter[str] = Counter()
        for task, outcome in self._executor.results() if missing else ():
            trial = missing[task.key]
            if isinstance(outcome, Died):
                died[task.key] += 1
                if died[task.key] <= self.retries:
                    self._executor.submit(task)
                    continue
                outcome = self._given_up(task, trial, outcome, died[task.key])
            # times are not shown: what else ran there is not known
            yield trial, store(outcome, self.folder, max(2, self.jobs), trial)

    def _given_up(self, task: Task, trial: Trial, outcome: Died, tries: int) -> Result:
        reason = f"its worker ended {tries} times before it was done ({outcome.reason})"
        return {**failed(trial, reason), "where": {"on": self.on, "host": "", "process": os.getpid()}}
