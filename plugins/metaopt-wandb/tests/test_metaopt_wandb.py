"""Runs of Weights & Biases, offline: what its own files hold, how a run goes on, what is refused."""

import json
import math
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install -e plugins/metaopt-wandb")

import metaopt_wandb  # noqa: E402
from wandb.proto import wandb_internal_pb2  # noqa: E402

import metaopt  # noqa: E402
from metaopt import Histogram, LogError, Table  # noqa: E402
from metaopt.registry import registry  # noqa: E402
from metaopt.testing import cases, prove  # noqa: E402

registry.load_plugin_module("metaopt_wandb")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No login of whoever runs the tests is seen, and nothing is printed."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    monkeypatch.setenv("WANDB_X_DISABLE_STATS", "true")


def records(place: Path) -> list[Any]:
    """Return what the files of all runs hold, each finished: W&B's own process may still be writing the last ones."""
    found: list[Any] = []
    for path in sorted(place.glob("wandb/*run-*/*.wandb")):
        until = time.monotonic() + 30
        while not (own := list(_records(path))) or own[-1].WhichOneof("record_type") != "exit":
            assert time.monotonic() < until, f"{path} has no end"
            time.sleep(0.02)
        found += own
    return found


def _records(path: Path) -> Iterator[Any]:
    """Yield what a file holds: records in blocks of 32 KiB, each piece with its length and type."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if at <= len(data) and kind in (1, 4):  # whole, or the last piece
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def history(place: Path) -> list[dict[str, Any]]:
    """Return every logged row; what is no number is a dict, which the file holds in pieces."""
    found = []
    for record in records(place):
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                tag, *piece = item.nested_key or [item.key]
                if piece:
                    row.setdefault(tag, {})["/".join(piece)] = json.loads(item.value_json)
                else:
                    row[tag] = json.loads(item.value_json)
            found.append(row)
    return found


def points(place: Path, tag: str) -> list[tuple[int, Any]]:
    return [(row["update"], row[tag]) for row in history(place) if tag in row]


def test_a_run_has_its_points_settings_and_the_page_of_the_run(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    log = metaopt_wandb.WandB(tmp_path, "first", "project")
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
    assert [step for step, _ in points(tmp_path, "monitor/update_ratio/weight")] == [2, 4]
    assert points(tmp_path, "val/loss") == [(step, 0.5) for step in (1, 2, 3, 4)]  # the first after the point at 2
    (_, histogram), _ = points(tmp_path, "monitor/weights")
    assert histogram["_type"] == "histogram" and sum(histogram["values"]) == 8
    ((_, table),) = points(tmp_path, "metaopt/groups")
    rows = json.loads((next(tmp_path.glob("wandb/*run-*/files")) / table["path"]).read_text())
    assert rows["columns"][0] == "group"
    assert points(tmp_path, "metaopt/schedule/lr")[0][1]["_type"] == "image-file"
    every = records(tmp_path)
    (run,) = [record.run for record in every if record.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (run.display_name, run.project, config["clip_grad_norm.max_norm"]) == ("first", "project", 1.0)
    assert "cosine" in config["stack"] and "cosine" in run.notes
    axes = {(r.metric.name or r.metric.glob_name, r.metric.step_metric) for r in every if r.HasField("metric")}
    assert {("train/*", "update"), ("monitor/*", "update"), ("val/*", "update")} <= axes


def test_a_killed_run_goes_on_under_its_id_without_writing_points_twice(tmp_path: Path) -> None:
    left = metaopt_wandb.WandB(tmp_path)
    left.open(step=0, tags=(), spec="sgd", hparams={"lr": 0.1})
    for step in range(1, 6):
        left.scalars(step, {"a": math.inf if step == 5 else math.nan if step == 4 else float(step)})
    identity = left._run.id
    left.close()
    with left._points.path.open("a") as file:
        file.write('{"update": 6, "val')
    again = metaopt_wandb.WandB(tmp_path)
    again.open(step=3, tags=(), spec="sgd", hparams={"lr": 0.2})
    assert again._run.id == identity
    again.scalars(4, {"a": math.nan})
    again.scalars(5, {"a": math.inf})
    again.scalars(6, {"a": 6.0})
    again.open(step=5, tags=(), spec="sgd", hparams={"lr": 0.2})
    again.scalars(6, {"a": 7.0})  # went another way: W&B cannot delete the other value
    again.close()
    assert [step for step, _ in points(tmp_path, "a")] == [1, 2, 3, 4, 5, 6, 6]
    assert [value for step, value in points(tmp_path, "a") if step == 6] == [6.0, 7.0]
    anew = metaopt_wandb.WandB(tmp_path)
    anew.open(step=0, tags=(), spec="sgd", hparams={})
    assert anew._run.id != identity
    anew.close()


def test_a_run_of_the_callers_takes_everything_and_goes_on(tmp_path: Path) -> None:
    with wandb.init(dir=tmp_path, mode="offline", reinit="create_new") as run:
        log = metaopt_wandb.WandB(run)
        log.open(step=0, tags=(), spec="sgd", hparams={"lr": 0.1})
        log.scalars(2, {"train/loss": 1.0})
        many = tuple(float(i) for i in range(1501))
        log.histograms(2, {"h": Histogram(many, (1.0,) * 1500)})
        log.tables(2, {"größe/t": Table(("a", "b"), ((1.5, None), (math.inf, "x")))})
        log.texts(2, {"note [x]": "**bold**"})
        log.close()
        run.log({"own": 1.0})
        assert run.config["lr"] == 0.1
    assert points(tmp_path, "train/loss") == [(2, 1.0)] and history(tmp_path)[-1]["own"] == 1.0
    ((_, joined),) = points(tmp_path, "h")
    assert sum(joined["values"]) == 1500 and joined["bins"][0] == 0.0 and joined["bins"][-1] == 1500.0
    assert points(tmp_path, "note [x]")[0][1]["_type"] == "table-file"


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="mode must be 'online', 'offline', 'disabled' or None, got 'of'"):
        metaopt_wandb.WandB(tmp_path, mode="of")
    with pytest.raises(LogError, match="place must be a directory, a run of wandb or None, got 3"):
        metaopt_wandb.WandB(3)  # type: ignore[arg-type]


def test_it_passes_the_checks_of_loggers() -> None:
    (case,) = cases("wandb")
    results = prove(case)
    assert [(result.status, result.reason) for result in results if result.status != "passed"] == []
    assert len(results) >= 4
