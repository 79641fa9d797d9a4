"""Trials by submitit, whose local executor takes the place of Slurm."""

import pytest

from metaopt import ProblemError
from metaopt.lab.comparison import run_comparison
from metaopt.lab.plan import plan_comparison
from metaopt.registry import registry
from metaopt.testing.executors import results_of

pytest.importorskip("metaopt_slurm", reason="the plugin is not installed", exc_type=ImportError)

from metaopt_slurm import Slurm

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
