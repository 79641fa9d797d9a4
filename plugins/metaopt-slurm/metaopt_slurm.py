"""Trials on Slurm, by submitit: job arrays whose jobs run several trials each."""

import json
import os
import subprocess
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import submitit

from metaopt import ProblemError, hookimpl
from metaopt.lab.executors import Died, Executor, Result, Task

# trials of one job: to start a job costs seconds
PER_JOB = 8
# seconds between two looks at what the jobs have written
LOOK = 0.2
# seconds that a process of this machine has to end
PATIENCE = 30.0
# seconds between two questions to Slurm
ASK = 5.0


def _run(tasks: list[Task], folder: str) -> None:
    """Run some trials, and write each result as it comes: what is done stays if the job ends early."""
    for task in tasks:
        result = json.dumps(task.run("slurm"))
        path = Path(folder, f"{task.key}.json")
        path.with_suffix(".part").write_text(result)
        path.with_suffix(".part").replace(path)


class Queue:
    """Which jobs have left Slurm's queue, by `squeue`: `sacct` needs a database that not every cluster has."""

    def __init__(self) -> None:
        self._asked = time.monotonic()
        # how many answers in a row were without it
        self._absent: dict[str, int] = {}

    def left(self, jobs: Collection[str]) -> set[str]:
        """Return those that two answers in a row were without: a result may come late on a shared disk."""
        if time.monotonic() - self._asked >= ASK:
            self._asked = time.monotonic()
            command = ["squeue", "--noheader", "--array", "--format=%i", f"--user={os.getuid()}"]
            answer = subprocess.run(command, capture_output=True, text=True)
            # a controller that does not answer has ended nothing
            if answer.returncode == 0:
                there = set(answer.stdout.split())
                self._absent = {job: 0 if job in there else self._absent.get(job, 0) + 1 for job in jobs}
        return {job for job in jobs if self._absent.get(job, 0) >= 2}


class Slurm(Executor):
    """`--on slurm`, or with parameters of submitit: `slurm:partition=gpu,timeout_min=120`, `slurm:cluster=local`."""

    def __init__(self, address: str, folder: Path, jobs: int) -> None:
        super().__init__(address, folder, jobs)
        given = _parameters(address)
        self._per_job = int(given.pop("per_job", PER_JOB))
        self._logs = folder / "slurm"
        self._found = self._logs / "results"
        self._found.mkdir(parents=True, exist_ok=True)
        cluster = given.pop("cluster", None)
        self._submitter = submitit.AutoExecutor(self._logs, cluster=cluster)
        defaults = {"name": "metaopt", "timeout_min": 60, "cpus_per_task": 1}
        if self._submitter.cluster == "slurm":
            defaults["slurm_array_parallelism"] = jobs
        self._submitter.update_parameters(**{**defaults, **given})
        self._waiting: list[Task] = []
        self._running: list[tuple[Any, list[Task]]] = []
        # jobs whose results are all here
        self._ending: list[Any] = []
        self._queue = Queue()

    def submit(self, task: Task) -> None:
        # one that an earlier driver left is taken
        self._waiting.append(task)

    def results(self) -> Iterator[tuple[Task, Result | Died]]:
        while self._waiting or self._running:
            self._start()
            came, ended = False, self._ended()
            for job, tasks in list(self._running):
                for task in list(tasks):
                    outcome: Result | Died | None = self._outcome(task)
                    if outcome is None and job.job_id in ended:
                        outcome = Died(f"job {job.job_id} ended without its result; see {job.paths.stderr}")
                    if outcome is not None:
                        tasks.remove(task)
                        came = True
                        yield task, outcome
                if not tasks:
                    self._running.remove((job, tasks))
                    self._ending.append(job)
            if not came:
                time.sleep(LOOK)

    def _start(self) -> None:
        """Submit what waits as one array; on this machine only as many jobs as may run at once."""
        free = None if self._submitter.cluster == "slurm" else max(0, self.jobs - len(self._running))
        packs = [self._waiting[i : i + self._per_job] for i in range(0, len(self._waiting), self._per_job)]
        packs = packs[:free]
        if not packs:
            return
        self._waiting = self._waiting[sum(map(len, packs)) :]
        started = self._submitter.map_array(_run, packs, [str(self._found)] * len(packs))
        self._running += zip(started, map(list, packs), strict=True)

    def _ended(self) -> set[str]:
        """Return the running jobs that have ended: what they have not written by now does not come."""
        if self._submitter.cluster != "slurm":
            return {job.job_id for job, _ in self._running if job.done()}
        written = {job.job_id for job, _ in self._running if job.paths.result_pickle.exists()}
        return written | self._queue.left([job.job_id for job, _ in self._running])

    def _outcome(self, task: Task) -> Result | None:
        path = self._found / f"{task.key}.json"
        try:
            found: Result = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        path.unlink(missing_ok=True)
        return found

    def cancel(self) -> None:
        for job, _ in self._running:
            job.cancel()
            self._ending.append(job)
        self._running.clear()
        # processes of this machine end before their owner lets go of them; what Slurm runs ends without us
        until = time.monotonic() + PATIENCE
        while self._submitter.cluster != "slurm" and time.monotonic() < until:
            if all(job.done() for job in self._ending):
                break
            time.sleep(LOOK)


def _parameters(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ProblemError(f"--on slurm: parameters must be NAME=VALUE, separated by commas, got {pair!r}")
        found[name.strip()] = int(value) if value.strip().isdigit() else value.strip()
    return found


@hookimpl
def metaopt_executors() -> dict[str, type[Executor]]:
    return {"slurm": Slurm}
