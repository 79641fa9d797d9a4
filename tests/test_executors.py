"""Where trials run: the same results everywhere, and a worker that dies costs one try."""

import os
import socket
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import warm

from metaopt.errors import ProblemError
from metaopt.lab.comparison import run_comparison
from metaopt.lab.executors import Died, Executor, Task, executor_named, task_of
from metaopt.lab.executors.driver import Driver
from metaopt.lab.executors.folder import Folder, Worker
from metaopt.lab.plan import Plan, plan_comparison
from metaopt.lab.trial import Trial
from metaopt.lab.workers import Workers
from metaopt.registry import registry
from metaopt.testing import cases, prove
from metaopt.testing.executors import results_of


def plan(out: Path, on: str = "local", **more: object) -> Plan:
    specs = ["sgd", "adamw"]
    settings = {"problem": "rosenbrock", "specs": specs, "studies": 2, "trials": 2, "steps": 30, "out": out, "on": on}
    return plan_comparison(**{**settings, **more})


def trials_of(made: Plan) -> list[Trial]:
    return [trial for position in range(2) for number in range(2) for trial in made.study(position, number).values()]


def work(out: Path, lease: float, idle: float = 5.0) -> int:
    os.chdir(out.parent)
    return Worker(out, lease).work(idle)


@pytest.fixture
def workers():
    started = []

    def start(out: Path, lease: float = 30.0) -> None:
        process = warm.context().Process(target=work, args=(out, lease))
        process.start()
        started.append(process)

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.mark.slow
def test_workers_on_a_folder_give_the_results_of_one_process_bit_for_bit(tmp_path, workers):
    expected = results_of(run_comparison(plan(tmp_path / "local")))
    for _ in range(2):
        workers(tmp_path / "out")
    found = run_comparison(plan(tmp_path / "out", "folder"))
    assert results_of(found) == expected
    assert {run["where"]["on"] for contender in found.contenders for run in contender.runs} == {"folder"}
    assert not list((tmp_path / "out" / "tasks").glob("*.lease"))


def test_a_driver_on_another_executor_does_only_what_is_missing(tmp_path, monkeypatch):
    made = plan(tmp_path, "folder")
    first, *others = trials_of(made)
    tasks = Folder("", tmp_path, 1)
    tasks.submit(task_of(first, ()))
    # its driver is gone; the worker keeps the result all the same
    assert Worker(tmp_path).run_one() == first.key()
    asked = []
    monkeypatch.setattr("metaopt.lab.workers.run_trial", lambda trial: asked.append(trial) or {**ran[trial]})
    ran = {trial: Task(trial.key(), asdict(trial)).run("here") for trial in others}
    run_comparison(plan(tmp_path))
    assert sorted(trial.key() for trial in asked) == sorted(trial.key() for trial in others)


def test_an_old_lease_is_taken_over_by_one_worker_and_the_driver_learns_of_it(tmp_path):
    trial = trials_of(plan(tmp_path))[0]
    tasks = Folder("", tmp_path, 1)
    tasks.submit(task_of(trial, ()))
    lease = tmp_path / "tasks" / f"{trial.key()}.lease"
    lease.write_text("another")
    assert Worker(tmp_path).run_one() is None
    past = time.time() - 100
    os.utime(lease, (past, past))
    assert Worker(tmp_path).run_one() is None
    ((task, outcome),) = [found for found, _ in zip(tasks.results(), range(1), strict=False)]
    assert isinstance(outcome, Died)
    assert "another gave no sign of life for 100 s" in outcome.reason
    tasks.submit(task)
    assert Worker(tmp_path).run_one() == trial.key()
    ((_, outcome),) = list(tasks.results())
    assert outcome["failed"] is None


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_one_try(tmp_path, workers, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)
    registry.load_plugin_module("mortal")
    (tmp_path / "marks").mkdir()
    problem = f"mortal(marks={str(tmp_path / 'marks')!r}, tries=2, driver={os.getpid()})"
    made = plan(tmp_path / "out", "folder", problem=problem, plugins=["mortal"])
    for _ in range(4):
        workers(tmp_path / "out", 1.0)
    found = run_comparison(made)
    assert len(list((tmp_path / "marks").iterdir())) == 2
    assert [run["failed"] for contender in found.contenders for run in contender.runs] == [None] * 4


class Nowhere(Folder):
    """A place where every task dies."""

    def results(self):
        while self._waiting:
            yield self._waiting.popitem()[1], Died("the machine is gone")


def test_a_trial_that_dies_again_and_again_is_told_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("metaopt.registry.registry.executors", lambda: {"nowhere": Nowhere})
    trial = trials_of(plan(tmp_path))[0]
    (tmp_path / "trials").mkdir()
    with Driver("nowhere", tmp_path / "trials", 1, (), retries=2) as driver:
        ((_, result),) = driver.results([trial])
    assert result["failed"] == "its worker ended 3 times before it was done (the machine is gone)"
    assert result["spec"] == trial.spec


def test_an_executor_that_does_not_exist_is_refused_with_those_that_do(tmp_path):
    with pytest.raises(ProblemError, match=r"no executor is called 'foldr'\. Did you mean folder\?.*local"):
        executor_named("foldr", tmp_path, 1)


def test_a_worker_with_other_code_refuses_the_task(tmp_path):
    trial = trials_of(plan(tmp_path))[0]
    task = Task(trial.key(), {**asdict(trial), "circumstances": "other"})
    with pytest.raises(ProblemError, match="has other code, versions or data than the driver"):
        task.run("here")


def test_a_plugin_that_has_no_part_in_a_trial_is_known_to_its_worker_too(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)
    registry.load_plugin_module("mortal")
    trial = trials_of(plan(tmp_path, plugins=["mortal"]))[0]
    assert task_of(trial, ("mortal",)).run("here")["failed"] is None


class InThisProcess(Executor):
    """What an executor must not be: a trial can end its driver."""

    def __init__(self, *given):
        super().__init__(*given)
        self.waiting = []

    def submit(self, task):
        self.waiting.append(task)

    def results(self):
        while self.waiting:
            task = self.waiting.pop()
            yield task, task.run("here")

    def cancel(self):
        pass


def proved(name: str) -> dict[str, tuple[str, str]]:
    if name == "here":  # in a process of its own
        registry.executors = lambda: {"here": InThisProcess}
    return {result.check: (result.status, result.reason) for result in prove(cases(name)[0])}


@pytest.mark.slow
def test_check_proves_an_executor_and_finds_what_is_wrong_with_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    warm.context()  # workers are forks of a process that is warm
    assert {status for status, _ in proved("folder").values()} == {"passed"}
    found = warm.called(proved, "here")
    assert found["gives_the_results_of_this_process"][0] == "passed"
    assert "runs in the process of the driver" in found["a_killed_worker_costs_one_try"][1]
    assert not list(tmp_path.iterdir())


def test_local_results_say_where_they_were_made_and_are_retried_as_often_as_asked(tmp_path, monkeypatch):
    trial = trials_of(plan(tmp_path))[0]
    with Workers(tmp_path, 1, retries=0) as workers:
        ((_, result),) = workers.results([trial])
        assert workers.tries == 1
    assert result["where"] == {"on": "local", "host": socket.gethostname(), "process": os.getpid()}
