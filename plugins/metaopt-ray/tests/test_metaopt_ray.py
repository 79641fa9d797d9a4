"""Trials on a real Ray cluster of two nodes on one machine, one of which is killed."""

import threading
from pathlib import Path

import pytest

from metaopt.lab.comparison import run_comparison
from metaopt.lab.plan import plan_comparison
from metaopt.registry import registry
from metaopt.testing.executors import results_of

pytest.importorskip("metaopt_ray", reason="the plugin is not installed", exc_type=ImportError)

import ray
from ray.cluster_utils import Cluster

# found by its entry point where it is installed
registry.load_plugin_module("metaopt_ray")


def compared(out: Path, on: str):
    settings = {"specs": ["sgd", "adamw"], "studies": 4, "trials": 2, "steps": 400, "jobs": 2}
    return run_comparison(plan_comparison(problem="rosenbrock", out=out, on=on, **settings))


@pytest.mark.slow
def test_a_node_that_is_killed_changes_no_result(tmp_path):
    expected = results_of(compared(tmp_path / "local", "local"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    other = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        nodes = len([node for node in ray.nodes() if node["Alive"]])
        assert nodes == 2

        def kill() -> None:
            # when it has begun to train
            trials = tmp_path / "ray" / "trials"
            while not list(trials.glob("*.json")):
                stop.wait(0.05)
                if stop.is_set():
                    return
            cluster.remove_node(other, allow_graceful=False)

        stop = threading.Event()
        killer = threading.Thread(target=kill)
        killer.start()
        found = compared(tmp_path / "ray", "ray")
        stop.set()
        killer.join()
        assert len([node for node in ray.nodes() if node["Alive"]]) == 1
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert results_of(found) == expected
    assert {run["where"]["on"] for contender in found.contenders for run in contender.runs} == {"ray"}
