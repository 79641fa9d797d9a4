"""Trials on a Ray cluster: one task for each, with one processor, and one GPU where it trains on one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from metaopt import ProblemError, hookimpl, warn
from metaopt.lab.executors import Died, Executor, Result, Task


def _run(task: Task) -> Result:
    return task.run("ray")


class Ray(Executor):
    """`--on ray` starts Ray here; `ray:auto` or another address joins a cluster that runs."""

    def __init__(self, address: str, folder: Path, jobs: int) -> None:
        super().__init__(address, folder, jobs)
        self._running: dict[Any, Task] = {}
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            where: dict[str, Any] = {"address": address} if address else {"num_cpus": jobs, "include_dashboard": False}
            ray.init(log_to_driver=False, logging_level="error", **where)
        # what dies is told to the driver, which counts
        self._remote = ray.remote(max_retries=0)(_run)

    def submit(self, task: Task) -> None:
        gpus = int(task.trial["device"].startswith("cuda"))
        if gpus and not self._running and not ray.cluster_resources().get("GPU"):
            # Ray itself would wait without a word
            if self._is_ours:
                raise ProblemError("--on ray: no GPU on this machine, and --device cuda needs one for each trial")
            warn(
                "no node of the Ray cluster has a GPU: trials with --device cuda wait until one comes",
            )
        self._running[self._remote.options(num_cpus=1, num_gpus=gpus).remote(task)] = task

    def results(self) -> Iterator[tuple[Task, Result | Died]]:
        while self._running:
            done, _ = ray.wait(list(self._running), num_returns=1)
            for reference in done:
                task = self._running.pop(reference)
                try:
                    outcome: Result | Died = ray.get(reference)
                except ray.exceptions.RayError as error:
                    outcome = Died(_reason(error))
                yield task, outcome

    def cancel(self) -> None:
        for reference in self._running:
            ray.cancel(reference, force=True)
        self._running.clear()
        if self._is_ours:
            ray.shutdown()


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    first = next(iter(str(cause).strip().splitlines()), "")
    return f"{type(cause).__name__}: {first:.200}"


@hookimpl
def metaopt_executors() -> dict[str, type[Executor]]:
    return {"ray": Ray}
