"""Trials by submitit, whose local executor takes the place of Slurm."""

import pytest

from metaopt import ProblemError
from metaopt.lab.comparison import run_comparison
from metaopt.lab.plan import plan_comparison
from metaopt.registry import registry
from metaopt.testing.executors import results_of

pytest.importorskip("metaopt_slurm", reason="the plugin is not installed", exc_type=ImportError)

import metaopt_slurm
from metaopt_slurm import Queue, Slurm

# found by its entry point where it is installed
registry.load_plugin_module("metaopt_slurm")


def compared(out, on):
    settings = {"specs": ["sgd", "adamw"], "studies": 2, "trials": 2, "steps": 30, "jobs": 2}
    return run_comparison(plan_comparison(problem="rosenbrock", out=out, on=on, **settings))


@pytest.mark.slow
def test_jobs_of_several_trials_give_the_results_of_one_process(tmp_path):
    expected = results_of(compared(tmp_path / "local", "local"))
    found = compared(tmp_path / "slurm", "slurm:cluster=local,per_job=4")
    assert results_of(found) == expected
    assert {run["where"]["on"] for contender in found.contenders for run in contender.runs} == {"slurm"}
    # eight trials in two jobs
    assert len({run["where"]["process"] for c in found.contenders for s in c.studies for run in s.trials.values()}) == 2


def test_a_parameter_without_a_value_is_refused(tmp_path):
    with pytest.raises(ProblemError, match="parameters must be NAME=VALUE, separated by commas, got 'gpu'"):
        Slurm("gpu", tmp_path, 1)


def test_a_job_has_left_the_queue_when_two_answers_in_a_row_are_without_it(tmp_path, monkeypatch):
    # the programs of Slurm are not on a machine of tests: this one says what the file beside it says, or fails
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\ncat {tmp_path}/queue\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(metaopt_slurm, "ASK", 0.0)
    answers, queue, jobs = tmp_path / "queue", Queue(), ["7_0", "7_1"]
    seen = []
    for answer in ("7_0\n7_1\n", "7_1\n", "7_0\n7_1\n", "7_1\n", None, "7_1\n"):
        answers.unlink(missing_ok=True)
        if answer is not None:
            answers.write_text(answer)
        seen.append(queue.left(jobs))
    assert seen == [set(), set(), set(), set(), set(), {"7_0"}]
