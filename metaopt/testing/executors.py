"""Checks of executors: trials have the results that they have here, and a killed worker costs one try."""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaopt.errors import MetaoptError
from metaopt.lab.executors import Executor, Task, executor_named, task_of
from metaopt.lab.executors.driver import Driver
from metaopt.lab.trial import Trial
from metaopt.registry import registry
from metaopt.testing.outcome import CheckFailed, check
from metaopt.testing.subject import Subject

if TYPE_CHECKING:
    from metaopt.lab.comparison import Comparison

# where a result was made and how long that took is no part of it
OF_THE_PLACE = ("where", "jobs", "seconds")
JOBS = 2
ORDINARY = range(10, 14)
KILLED, SLOW = 1, range(20, 28)
# seconds: of a slow trial, after cancel(), and until what waits would have begun
LASTS, SOON, QUIET = 3.0, 1.0, 5.0

PLUGIN = "metaopt_checked_valley"
SOURCE = f'''
"""What `metaopt check` lets an executor run: a valley that marks its trials in a folder."""

import os
import signal
import time
from pathlib import Path

from metaopt import Problem, hookimpl, hyper
from metaopt.problems.toys import Rosenbrock


class CheckedValley(Rosenbrock):
    """Seed {KILLED} is killed at its first try, and seeds from {SLOW.start} on take a while."""

    marks: str = hyper(doc="the folder in which trials are marked")
    driver: int = hyper(0, doc="the process that lives")

    def model(self, seed, device="cpu"):
        mark = Path(self.marks, str(seed))
        is_first = not mark.exists()
        mark.touch()
        if os.getpid() == self.driver:
            raise RuntimeError("the trial runs in the process of the driver, which a trial can kill")
        if seed == {KILLED} and is_first:
            os.kill(os.getpid(), signal.SIGKILL)
        if seed >= {SLOW.start}:
            time.sleep({LASTS})
        return super().model(seed, device)


@hookimpl
def metaopt_problems() -> dict[str, type[Problem]]:
    return {{"{PLUGIN}": CheckedValley}}
'''


def results_of(comparison: "Comparison") -> list[dict[str, Any]]:
    """Return the results of all trials, without what depends on the place: two places give equal lists."""
    runs = [run for contender in comparison.contenders for study in contender.studies for run in study.trials.values()]
    return [_of_no_place(run) for run in runs]


def _of_no_place(run: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key not in OF_THE_PLACE}


@dataclass(frozen=True)
class Seen:
    """What an executor made of trials: the results by seed, of those that are ordinary here as well."""

    results: dict[int, dict[str, Any]]
    here: dict[int, dict[str, Any]]
    marks: set[str]


class ExecutorSubject(Subject):
    """An executor: `text` is what stands behind `--on`."""

    @cached_property
    def seen(self) -> Seen:
        """Return what came of some trials, of which one is killed once."""
        with self._place() as (folder, marks):
            trials = [_trial("rosenbrock", seed) for seed in ORDINARY] + [_trial(_valley(marks), KILLED)]
            (folder / "trials").mkdir()
            with Driver(self.text, folder / "trials", JOBS, (PLUGIN,), retries=2) as driver:
                results = {trial.seed: result for trial, result in driver.results(trials)}
            here = {trial.seed: Task(trial.key(), task_of(trial, ()).trial).run("here") for trial in trials[:-1]}
            return Seen(results, here, {path.name for path in marks.iterdir()})

    def begun_after_cancel(self) -> tuple[int, int]:
        """Return how many slow trials had begun when they were cancelled, and how many some time later."""
        with self._place() as (folder, marks):
            executor = executor_named(self.text, folder, JOBS)
            for seed in SLOW:
                executor.submit(task_of(_trial(_valley(marks), seed), (PLUGIN,)))
            results = executor.results()
            try:
                next(results)  # some executors begin when they are asked for a result
            finally:
                executor.cancel()
            time.sleep(SOON)  # what was beginning at that moment has begun
            before = len(list(marks.iterdir()))
            time.sleep(QUIET)
            return before, len(list(marks.iterdir()))

    @contextlib.contextmanager
    def _place(self) -> Iterator[tuple[Path, Path]]:
        """Hold a folder for trials, which lies in the current one: workers elsewhere see that one if any."""
        kind: type[Executor] = self.entry.target
        before = os.getcwd()
        with tempfile.TemporaryDirectory(prefix=".metaopt-check-", dir=".", ignore_cleanup_errors=True) as name:
            folder = Path(name).absolute()
            (folder / "marks").mkdir()
            (folder / f"{PLUGIN}.py").write_text(SOURCE)
            os.chdir(folder)  # a plugin of the current folder is found by the workers
            try:
                with kind.workers(folder):
                    yield folder, folder / "marks"
            finally:
                os.chdir(before)


def _valley(marks: Path) -> str:
    return f"{PLUGIN}(marks={str(marks)!r}, driver={os.getpid()})"


def _trial(problem: str, seed: int) -> Trial:
    return Trial(problem, "sgd(lr=0.001)", seed, 20, 20, 1, "cpu", "")


@check("executor")
def gives_the_results_of_this_process(subject: ExecutorSubject) -> None:
    """Each trial has the result that it has in this process, bit for bit, and says where it was made."""
    seen = subject.seen
    for seed, expected in seen.here.items():
        found = seen.results.get(seed)
        if found is None or found["failed"]:
            raise CheckFailed(
                f"{subject}: of a trial came {'nothing' if found is None else found['failed']}",
                "A comparison would miss it",
                "Yield every task once from results(), with what task.run(name) returned",
            )
        # read back from a file, as those of the executor are
        if _of_no_place(found) != _read_back(_of_no_place(expected)):
            raise CheckFailed(
                f"{subject}: a trial has another result than in this process",
                "Results of several places could not be compared",
                "Hand on what task.run(name) returns as it is, and run it on the same kind of processor",
            )
        if not found["where"].get("on") or not found["where"].get("process"):
            raise CheckFailed(
                f"{subject}: a result does not say where it was made",
                "results.json tells that of every trial",
                "Call task.run(name) with the executor's name",
            )


@check("executor")
def plugins_reach_the_workers(subject: ExecutorSubject) -> None:
    """A problem of a plugin in the current folder can be trained."""
    if str(KILLED) not in subject.seen.marks:
        raise CheckFailed(
            f"{subject}: a trial of a problem from a plugin never began: {subject.seen.results[KILLED]['failed']}",
            "Users give --plugin and their own problems",
            "Send the whole task: task.run() loads its plugins",
        )


@check("executor", presumes=("plugins_reach_the_workers",))
def a_killed_worker_costs_one_try(subject: ExecutorSubject) -> None:
    """A task whose worker is killed comes back as Died, and has its result when it is submitted again."""
    failed = subject.seen.results[KILLED]["failed"]
    if failed:
        raise CheckFailed(
            f"{subject}: the second try of a trial whose worker was killed: {failed}",
            "Machines fail, and one that is lost would end a comparison",
            "Yield Died(reason) for a task whose worker ended, and take it again when it is submitted",
        )


@check("executor", presumes=("plugins_reach_the_workers",))
def cancel_ends_what_has_not_begun(subject: ExecutorSubject) -> None:
    """After cancel() no task begins that has not begun before it."""
    before, after = subject.begun_after_cancel()
    if after > before:
        raise CheckFailed(
            f"{subject}: {after - before} tasks began after cancel()",
            "A Ctrl-C would leave processes behind that nobody waits for",
            "Drop what waits and end what runs in cancel()",
        )


def is_executor(text: str) -> bool:
    """Return whether a text names an executor, such as `slurm:cluster=local`."""
    try:
        return text.partition(":")[0] in registry.executors()
    except MetaoptError:
        return False


def _read_back(result: dict[str, Any]) -> Any:
    return json.loads(json.dumps(result))
