"""Runs in a real MLflow store: what is written, how a run goes on, what is refused."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mlflow", reason="MLflow is not installed: pip install -e plugins/metaopt-mlflow")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of MLflow's own use of SQLAlchemy
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # it leaves connections to the collector
]

import metaopt_mlflow  # noqa: E402

import metaopt  # noqa: E402
from metaopt import Histogram, LogError, Logger, Table  # noqa: E402
from metaopt.registry import registry  # noqa: E402
from metaopt.testing import cases, prove  # noqa: E402

registry.load_plugin_module("metaopt_mlflow")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an empty store: MLflow needs seconds to make one, so each test takes a copy."""
    folder = tmp_path_factory.mktemp("store")
    metaopt_mlflow.MLflow(folder)._made()
    return folder / "mlflow.db"


@pytest.fixture
def place(store: Path, tmp_path: Path) -> Path:
    shutil.copy(store, tmp_path / "mlflow.db")
    return tmp_path


def runs(log: Any) -> list[Any]:
    experiment = log._made().get_experiment_by_name(log.experiment)
    return list(log._made().search_runs([experiment.experiment_id]))


def points(log: Any, tag: str) -> list[tuple[int, float]]:
    (run,) = runs(log)
    return [(point.step, point.value) for point in log._made().get_metric_history(run.info.run_id, tag)]


def artifact(log: Any, path: str) -> Any:
    (run,) = runs(log)
    file = log._made().download_artifacts(run.info.run_id, path)
    return Path(file).read_text()


def test_a_run_has_its_points_settings_spec_and_the_page_of_the_run(place: Path) -> None:
    model = torch.nn.Linear(3, 2)
    log = metaopt_mlflow.MLflow(place, "first")
    spec = "clip_grad_norm(1.0) | adamw(lr=cosine(0.1)) | monitor(histograms=True)"
    opt = metaopt.build(model, spec, log=log, log_every=2, total_steps=4)
    for _ in range(4):
        opt.zero_grad()
        loss = model(torch.ones(5, 3)).square().mean()
        loss.backward()
        opt.record(loss=loss)
        opt.step()
    opt.record({"val/loss": 0.5})
    opt.close()
    (run,) = runs(log)
    assert run.info.run_name == "first" and run.info.status == "FINISHED"
    assert run.data.params["clip_grad_norm.max_norm"] == "1.0" and "cosine" in run.data.params["stack"]
    assert "clip_grad_norm" in run.data.tags["mlflow.note.content"]
    assert [step for step, _ in points(log, "monitor/update_ratio/weight")] == [2, 4]
    assert points(log, "val/loss") == [(4, 0.5)]
    assert json.loads(artifact(log, "metaopt/stack.json"))["parts"][1]["name"] == "adamw"
    assert json.loads(artifact(log, "metaopt/groups.json"))["columns"][0] == "group"
    counts = json.loads(artifact(log, "histograms/monitor/weights/000000004.json"))["counts"]
    assert sum(counts) == 8  # the numbers of the model
    images = [file.path for file in log._made().list_artifacts(run.info.run_id, "images")]
    assert any("metaopt~schedule~lr+step+0" in path and path.endswith(".png") for path in images)
    assert {"path": "metaopt/parts.json", "type": "table"} in json.loads(run.data.tags["mlflow.loggedArtifacts"])


def test_a_killed_run_goes_on_in_the_same_run_without_writing_points_twice(place: Path) -> None:
    left = metaopt_mlflow.MLflow(place)
    left.open(step=0, tags=(), spec="sgd(lr=0.1)", hparams={"lr": 0.1})
    for step in range(1, 6):
        left.scalars(step, {"a": math.inf if step == 5 else math.nan if step == 4 else float(step)})
    again = metaopt_mlflow.MLflow(place)
    again.open(step=3, tags=(), spec="sgd(lr=0.2)", hparams={"lr": 0.2})
    assert runs(again)[0].info.status == "RUNNING"
    again.scalars(4, {"a": math.nan})
    again.scalars(5, {"a": math.inf})
    again.scalars(6, {"a": 6.0})
    again.open(step=5, tags=(), spec="sgd(lr=0.2)", hparams={"lr": 0.2})
    again.scalars(6, {"a": 7.0})  # went another way: MLflow cannot delete the other value
    again.close()
    assert [step for step, _ in points(again, "a")] == [1, 2, 3, 4, 5, 6, 6]
    assert [value for step, value in points(again, "a") if step == 6] == [6.0, 7.0]
    assert runs(again)[0].data.params["lr"] == "0.1" and runs(again)[0].info.status == "FINISHED"


def test_a_run_that_begins_anew_and_one_of_another_name_are_runs_of_their_own(place: Path) -> None:
    for name, step in (("a", 0), ("a", 0), ("b", 7)):
        log = metaopt_mlflow.MLflow(place, name)
        log.open(step=step, tags=(), spec="sgd", hparams={})
        log.scalars(step + 1, {"loss": 1.0})
        log.close()
    assert sorted(run.info.run_name for run in runs(log)) == ["a", "a", "b"]


def test_any_tag_and_any_number_of_them_is_taken(place: Path) -> None:
    log = metaopt_mlflow.MLflow(place)
    log.open(step=0, tags=(), spec="sgd", hparams={f"p{i}": i for i in range(150)})
    odd = {"lr/group blocks.*": 1.0, "../a": 2.0, "a//b": 3.0, "x" * 300: 4.0, "größe": 5.0, "p(q)": 6.0}
    log.scalars(1, {**{f"many/{i}": float(i) for i in range(1100)}, **odd})
    log.histograms(1, {"b*/c": Histogram((0.0, 1.0), (2.0,))})
    log.tables(1, {"größe/t": Table(("a", "b"), ((1.5, None), (math.inf, "x")))})
    log.texts(1, {"note [x]": "**bold**"})
    metrics = runs(log)[0].data.metrics
    assert len(metrics) == 1100 + len(odd) and metrics["lr/group blocks._2a_"] == 1.0 and metrics["größe"] == 5.0
    assert json.loads(artifact(log, "gr_f6__df_e/t.json"))["data"] == [[1.5, None], ["inf", "x"]]
    assert artifact(log, "note _5b_x_5d_.md") == "**bold**"


def test_the_settings_of_mlflow_hold_and_a_run_of_the_callers_stays_open(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{place / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    log = metaopt_mlflow.MLflow()
    assert (log.uri, log.experiment) == (uri, "mine")
    experiment = log._made().create_experiment("mine", artifact_location=(place / "artifacts").as_uri())
    mine = log._made().create_run(experiment, run_name="theirs")
    log = metaopt_mlflow.MLflow(mine)
    log.open(step=0, tags=(), spec="sgd", hparams={})
    log.scalars(1, {"loss": 1.0})
    log.close()
    (run,) = runs(metaopt_mlflow.MLflow())
    assert run.info.run_name == "theirs" and run.info.status == "RUNNING" and run.data.metrics == {"loss": 1.0}


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(LogError, match='run must be a name without quotes, got "it\'s"'):
        metaopt_mlflow.MLflow(tmp_path, "it's")
    with pytest.raises(LogError, match="place must be a tracking URI, a directory, a run of MLflow or None, got 3"):
        metaopt_mlflow.MLflow(3)  # type: ignore[arg-type]
    log: Logger = metaopt_mlflow.MLflow("http:/nowhere")
    with pytest.raises(LogError, match="cannot write the beginning of the run to MLflow"):
        log.open(step=0, tags=(), spec="sgd", hparams={})


def test_it_passes_the_checks_of_loggers(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = metaopt_mlflow.MLflow._made

    def copied(self: Any) -> Any:
        if self._directory is not None and self._directory.parent.is_dir():
            self._directory.mkdir(exist_ok=True)
            if not (self._directory / "mlflow.db").exists():
                shutil.copy(store, self._directory / "mlflow.db")
        return made(self)

    monkeypatch.setattr(metaopt_mlflow.MLflow, "_made", copied)
    (case,) = cases("mlflow")
    results = prove(case)
    assert [(result.status, result.reason) for result in results if result.status != "passed"] == []
    assert len(results) >= 4
