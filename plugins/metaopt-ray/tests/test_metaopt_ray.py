"""Trials on a real Ray cluster of two nodes on one machine, one of which is killed."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from metaopt.lab.comparison import run_comparison
from metaopt.lab.plan import plan_comparison
from metaopt.lab.results import write_results
from metaopt.registry import registry
from metaopt.testing.executors import OF_THE_PLACE

pytest.importorskip("metaopt_ray", reason="the plugin is not installed", exc_type=ImportError)

import ray
from ray.cluster_utils import Cluster

# found by its entry point where it is installed
registry.load_plugin_module("metaopt_ray")

TRIALS = 16
# a node that does not answer is dead after two seconds instead of fifteen
SOON = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}


def compared(out: Path, **how: Any) -> tuple[dict, list[dict]]:
    """Return results.json of a comparison and the results of all trials."""
    settings = {"specs": ["sgd", "adamw"], "studies": 4, "trials": 2, "steps": 200}
    write_results(run_comparison(plan_comparison(problem="rosenbrock", out=out, **settings, **how)))
    trials = sorted((out / "trials").glob("*.json"))
    return json.loads((out / "results.json").read_text()), [json.loads(path.read_text()) for path in trials]


def of_no_place(found):
    """Return results without what depends on the place."""
    if isinstance(found, dict):
        return {key: of_no_place(value) for key, value in found.items() if key not in (*OF_THE_PLACE, "plan")}
    return [of_no_place(value) for value in found] if isinstance(found, list | tuple) else found


@pytest.fixture
def cluster():
    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": SOON}
    )
    yield made
    ray.shutdown()
    made.shutdown()


class Killer(threading.Thread):
    """Kills a node as soon as the first result is there; `done` is how many were there then."""

    def __init__(self, cluster: Cluster, node: object, trials: Path) -> None:
        super().__init__(daemon=True)
        self.cluster, self.node, self.trials = cluster, node, trials
        self.done = 0
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.02):
            self.done = len(list(self.trials.glob("*.json")))
            if self.done:
                self.cluster.remove_node(self.node, allow_graceful=False)
                return


@pytest.mark.slow
def test_a_node_that_is_killed_changes_no_result(tmp_path, cluster):
    expected = compared(tmp_path / "local", jobs=1)
    killer = Killer(cluster, cluster.add_node(num_cpus=1), tmp_path / "ray" / "trials")
    killer.start()
    try:
        found = compared(tmp_path / "ray", on=f"ray:{cluster.address}")
    finally:
        killer.stop.set()
        killer.join(60)
    assert 0 < killer.done < TRIALS
    assert of_no_place(found) == of_no_place(expected)
    assert len(found[1]) == TRIALS and {run["where"]["on"] for run in found[1]} == {"ray"}
