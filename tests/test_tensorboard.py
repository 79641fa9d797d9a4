"""TensorBoard, proved by the real server: what was logged is read back over HTTP."""

import copy
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from tensorboard_server import LOADERS, tensorboard, wait_until

import metaopt
from metaopt import LogError
from metaopt.loggers.jsonl import JsonLines
from metaopt.loggers.tensorboard import TensorBoard
from metaopt.metrics import Metrics


def log_run(directory, losses, *, first=1, every=1, hparams=None):
    metrics = Metrics(TensorBoard(directory), every=every, spec="sgd(lr=0.1)", hparams=hparams or {"sgd.lr": 0.1})
    for update, loss in enumerate(losses, first):
        metrics.measure("train/loss", torch.tensor(loss))
        metrics.measure("train/learning_rate", 0.1)
        metrics.end_update(update)
    return metrics


@pytest.mark.parametrize("loader", LOADERS)
def test_the_server_shows_what_was_logged(tmp_path, loader):
    logdir = tmp_path / "runs"
    log_run(logdir / "first", [4.0, 2.0, 1.0, 0.5], every=2).close()
    with tensorboard(logdir, loader) as server:
        assert server.get("runs") == ["first"]
        assert set(server.get("plugin/scalars/tags")["first"]) == {"train/loss", "train/learning_rate"}
        assert server.points("first", "train/loss") == [(2, 3.0), (4, 0.75)]
        assert server.points("first", "train/learning_rate") == [(2, pytest.approx(0.1)), (4, pytest.approx(0.1))]


def test_a_point_is_on_the_page_while_the_run_goes_on(tmp_path):
    logdir = tmp_path / "runs"
    metrics = log_run(logdir / "live", [4.0])
    with tensorboard(logdir) as server:
        assert server.points("live", "train/loss") == [(1, 4.0)]
    metrics.close()


@pytest.mark.parametrize("loader", LOADERS)
def test_a_resumed_run_leaves_no_points_from_after_its_checkpoint(tmp_path, loader):
    logdir = tmp_path / "runs"
    log_run(logdir / "run", [1.0] * 9)  # killed after update 9, never closed
    log_run(logdir / "run", [2.0, 2.0], first=6).close()  # from a checkpoint taken at update 5
    with tensorboard(logdir, loader) as server:
        assert server.points("run", "train/loss") == [(t, 1.0) for t in range(1, 6)] + [(6, 2.0), (7, 2.0)]


@pytest.mark.parametrize("loader", LOADERS)
def test_a_new_run_in_an_old_directory_shows_none_of_the_old_points(tmp_path, loader):
    logdir = tmp_path / "runs"
    log_run(logdir / "run", [1.0] * 9).close()
    log_run(logdir / "run", [2.0, 2.0]).close()
    with tensorboard(logdir, loader) as server:
        assert server.points("run", "train/loss") == [(1, 2.0), (2, 2.0)]


def test_a_run_has_one_hparams_record_in_its_own_directory(tmp_path):
    logdir = tmp_path / "runs"
    log_run(logdir / "slow", [1.0] * 3, hparams={"sgd.lr": 0.1})
    log_run(logdir / "slow", [3.0], first=3, hparams={"sgd.lr": 0.1}).close()
    log_run(logdir / "fast", [2.0], hparams={"sgd.lr": 0.3}).close()
    assert sorted(path.name for path in logdir.rglob("*") if path.is_dir()) == ["fast", "slow"]
    with tensorboard(logdir) as server:
        experiment = server.post("plugin/hparams/experiment", {"experimentName": ""})
        assert "train/loss" in {info["name"]["tag"] for info in experiment["metricInfos"]}
        assert {info["name"] for info in experiment["hparamInfos"]} == {"stack", "sgd.lr"}
        asked = {
            "experimentName": "",
            "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
            "colParams": [{"metric": {"tag": "train/loss", "group": ""}}],
            "startIndex": 0,
            "sliceSize": 10,
        }
        sessions = [
            s for g in server.post("plugin/hparams/session_groups", asked)["sessionGroups"] for s in g["sessions"]
        ]
    losses = {
        session["name"].rstrip("/."): [m["value"] for m in session["metricValues"] if m["name"]["tag"] == "train/loss"]
        for session in sessions
    }
    assert losses == {"slow": [3.0], "fast": [2.0]}
    assert len(sessions) == 2
    records = [tag for tag in _tags(logdir / "slow") if tag == "_hparams_/session_start_info"]
    assert len(records) == 1


def test_the_hparams_of_all_runs_are_there_and_those_that_differ_come_first(tmp_path):
    logdir = tmp_path / "runs"
    for name, hparams in {
        "a": {"amsgrad": False, "lr": 0.1},
        "b": {"amsgrad": False, "lr": 0.3},
        "c": {"amsgrad": False, "lr": 0.1, "lookahead.k": 5},
    }.items():
        log_run(logdir / name, [1.0], hparams=hparams).close()
    with tensorboard(logdir) as server:
        wait_until(lambda: len(server.get("runs")) == 3 and server.differing())
        found = server.post("plugin/hparams/experiment", {"experimentName": ""})["hparamInfos"]
    assert [info["name"] for info in found] == ["lr", "amsgrad", "lookahead.k", "stack"]


def _tags(directory):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for path in sorted(directory.iterdir()):
        for event in EventFileLoader(str(path)).Load():
            yield from (value.tag for value in event.summary.value)


def test_a_summary_writer_stays_its_owners(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    logdir = tmp_path / "runs"
    with SummaryWriter(str(logdir / "mine")) as writer:
        metrics = Metrics(TensorBoard(writer), every=1)
        metrics.measure("train/loss", 2.0)
        metrics.end_update(1)
        metrics.close()
        writer.add_scalar("my/own", 5.0, 1)
    with tensorboard(logdir) as server:
        assert server.points("mine", "train/loss") == [(1, 2.0)]
        assert server.points("mine", "my/own") == [(1, 5.0)]


@pytest.mark.parametrize("make", [TensorBoard, lambda folder: JsonLines(folder / "log.jsonl")])
def test_a_place_that_cannot_be_written_is_an_error_at_once(tmp_path, make):
    occupied = tmp_path / "occupied"
    occupied.write_text("a file where the directory should go")
    with pytest.raises(LogError, match=r"cannot write to.*occupied"):
        make(occupied / "run")


@pytest.mark.parametrize("make", [TensorBoard, lambda folder: JsonLines(folder / "log.jsonl")])
def test_a_directory_that_disappears_is_a_clear_error(tmp_path, make):
    directory = tmp_path / "run"
    metrics = Metrics(make(directory), every=1)
    metrics.measure("train/loss", 1.0)
    metrics.end_update(1)
    shutil.rmtree(directory)
    metrics.measure("train/loss", 1.0)
    with pytest.raises(LogError, match=re.escape(str(directory))):
        metrics.end_update(2)
    metrics.close()


def json_run(path, losses, first=1):
    metrics = Metrics(JsonLines(path), every=1, spec="sgd(lr=0.1)", tags=["train/loss"])
    for update, loss in enumerate(losses, first):
        metrics.measure("train/loss", loss)
        metrics.end_update(update)
    metrics.close()


def test_json_lines_hold_the_run_and_its_points(tmp_path):
    json_run(tmp_path / "log.jsonl", [1.0, float("nan")])
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [
        {"spec": "sgd(lr=0.1)", "hparams": {}, "tags": ["train/loss"]},
        {"step": 1, "train/loss": 1.0},
        {"step": 2, "train/loss": "NaN"},
    ]


def test_a_file_of_json_lines_that_disappears_is_an_error_not_a_new_file(tmp_path):
    path = tmp_path / "log.jsonl"
    metrics = Metrics(JsonLines(path), every=1)
    metrics.measure("train/loss", 1.0)
    metrics.end_update(1)
    path.unlink()
    metrics.measure("train/loss", 1.0)
    with pytest.raises(LogError, match=r"update 2.*No such file"):
        metrics.end_update(2)
    assert not path.exists()


def test_json_lines_of_a_resumed_run_end_at_the_checkpoint_first(tmp_path):
    path = tmp_path / "log.jsonl"
    json_run(path, [1.0] * 4)
    with path.open("a") as file:
        file.write('{"step": 5, "tra')  # killed in the middle of a line
    json_run(path, [2.0], first=3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines[1:]] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert lines[0]["spec"] == "sgd(lr=0.1)"


@pytest.mark.parametrize(
    "content",
    [b"milk, eggs", b'{"step": 1}\n', b'{"spec": "sgd"}\n{"step": 1}\n', b"[]\n", b"\xff\xfe", b"\n"],
    ids=["text", "points", "another's first line", "a list", "bytes", "an empty line"],
)
def test_a_file_that_is_not_a_log_is_refused_and_stays(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(LogError, match=r"notes\.txt is not a log of metaopt") as raised:
        metaopt.build(torch.nn.Linear(2, 1, bias=False), "sgd(lr=0.1)", log=JsonLines(path))
    assert "\n" not in str(raised.value)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


def test_an_empty_file_becomes_a_log(tmp_path):
    path = tmp_path / "log.jsonl"
    path.touch()
    json_run(path, [1.0])
    assert len(path.read_text().splitlines()) == 2 and list(tmp_path.iterdir()) == [path]


def test_a_run_that_begins_anew_keeps_the_logs_of_earlier_ones(tmp_path):
    path = tmp_path / "log.jsonl"
    for loss in (1.0, 2.0, 3.0):
        json_run(path, [loss])
    losses = {file.name: json.loads(file.read_text().splitlines()[1])["train/loss"] for file in tmp_path.iterdir()}
    assert losses == {"log.1.jsonl": 1.0, "log.2.jsonl": 2.0, "log.jsonl": 3.0}


def test_a_run_that_goes_back_to_its_beginning_goes_on_in_the_same_file(tmp_path):
    path = tmp_path / "log.jsonl"
    metrics = Metrics(JsonLines(path), every=1)
    for update, loss in ((1, 1.0), (2, 2.0), (1, 3.0)):
        metrics.measure("train/loss", loss)
        metrics.end_update(update)
    metrics.close()
    assert [json.loads(line) for line in path.read_text().splitlines()[1:]] == [{"step": 1, "train/loss": 3.0}]
    assert list(tmp_path.iterdir()) == [path]


def test_importing_the_loggers_imports_no_tensorboard():
    code = "import sys, metaopt, metaopt.loggers.tensorboard; assert 'tensorboard' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def step_through(stack, model, updates):
    generator = torch.Generator().manual_seed(stack.updates)
    for _ in range(updates):
        inputs = torch.randn(16, 4, generator=generator)
        stack.zero_grad()
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        loss.backward()
        stack.record(loss=loss)
        stack.step()


def stack_of(directory, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    spec = "clip_grad_norm(0.1) | adamw(lr=0.03, weight_decay=0.0) | lookahead(k=3)"
    return model, metaopt.build(model, spec, log=directory, **options)


def test_a_stack_logs_under_names_that_people_know(tmp_path):
    logdir = tmp_path / "runs"
    model, stack = stack_of(logdir / "run", log_every=10)
    step_through(stack, model, 20)
    latest = stack.metrics()
    with tensorboard(logdir) as server:
        known = {"train/loss", "train/grad_norm", "train/learning_rate", "clip_grad_norm/clipped_fraction"}
        assert set(server.get("plugin/scalars/tags")["run"]) == known | {"lookahead/distance"}
        for tag in known | {"lookahead/distance"}:
            points = server.points("run", tag)
            assert [step for step, _ in points] == [10, 20]
        # measured at the point alone: the value read back is the value of that update
        assert server.points("run", "train/grad_norm")[-1][1] == pytest.approx(latest["train/grad_norm"])
        assert server.points("run", "train/learning_rate")[-1][1] == pytest.approx(0.03)
        # before clipping: what is logged lies above the threshold
        assert server.points("run", "train/grad_norm")[0][1] > 0.1
        assert server.points("run", "clip_grad_norm/clipped_fraction")[0][1] == 1.0


def test_a_stack_loaded_from_a_checkpoint_goes_on_in_its_log(tmp_path):
    logdir = tmp_path / "runs"
    model, stack = stack_of(logdir / "run", log_every=1)
    step_through(stack, model, 5)
    checkpoint = model.state_dict(), stack.state_dict()
    checkpoint = copy.deepcopy(checkpoint)
    step_through(stack, model, 4)
    model, stack = stack_of(logdir / "run", log_every=1)
    model.load_state_dict(checkpoint[0])
    stack.load_state_dict(checkpoint[1])
    step_through(stack, model, 2)
    with tensorboard(logdir) as server:
        assert [step for step, _ in server.points("run", "train/loss")] == [1, 2, 3, 4, 5, 6, 7]


def test_the_groups_rates_bear_the_groups_names(tmp_path):
    model = torch.nn.Linear(2, 1)
    groups = [{"params": [model.weight], "name": "body"}, {"params": [model.bias], "lr": 0.5}]
    stack = metaopt.build(groups, "sgd(lr=0.1)", log=tmp_path / "run", log_every=1)
    model(torch.ones(1, 2)).sum().backward()
    stack.step()
    rates = {tag: value for tag, value in stack.metrics().items() if "learning_rate" in tag}
    assert rates == {
        "train/learning_rate/group body": pytest.approx(0.1),
        "train/learning_rate/group 1": pytest.approx(0.5),
    }


def test_groups_of_one_name_have_rates_of_their_own_in_the_log():
    model = torch.nn.Linear(2, 1)
    groups = [{"params": [p], "name": "decay", "lr": lr} for p, lr in zip(model.parameters(), (0.1, 0.5), strict=True)]
    stack = metaopt.build(groups, "sgd", log_every=1)
    model(torch.ones(1, 2)).sum().backward()
    stack.step()
    rates = {tag: value for tag, value in stack.metrics().items() if "learning_rate" in tag}
    assert rates == {
        "train/learning_rate/group decay 0": pytest.approx(0.1),
        "train/learning_rate/group decay 1": pytest.approx(0.5),
    }


def test_what_happens_every_k_updates_is_seen_whatever_log_every_is(tmp_path):
    model, stack = stack_of(None, log_every=5)  # pulls at 3, 6, 9, ...: never at 5 or 10
    step_through(stack, model, 5)
    assert "lookahead/distance" in stack.metrics()


def test_wrap_and_build_take_every_kind_of_log(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    model = torch.nn.Linear(2, 1)
    with SummaryWriter(str(tmp_path / "writer")) as writer:
        for log in (str(tmp_path / "text"), tmp_path / "path", writer, JsonLines(tmp_path / "log.jsonl"), None):
            stack = metaopt.wrap(torch.optim.SGD(model.parameters(), lr=0.1), "lookahead", log=log, log_every=1)
            model(torch.ones(1, 2)).sum().backward()
            stack.step()
    assert {path.name for path in tmp_path.iterdir()} == {"text", "path", "writer", "log.jsonl"}
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["hparams"]["lookahead.k"] == 5


def test_a_log_that_cannot_be_written_stops_the_build(tmp_path):
    (tmp_path / "occupied").write_text("")
    with pytest.raises(LogError, match=r"cannot write to the log directory.*occupied"):
        metaopt.build(torch.nn.Linear(2, 1), "sgd(lr=0.1)", log=tmp_path / "occupied" / "run")


def test_a_copied_stack_writes_to_no_log(tmp_path):
    path = tmp_path / "log.jsonl"
    model, stack = stack_of(JsonLines(path), log_every=1)
    step_through(stack, model, 1)
    before = path.read_text()
    twin = copy.deepcopy(stack)
    for group in twin.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    twin.step()
    assert path.read_text() == before


def _events(directory):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return [e for path in sorted(directory.glob("*tfevents*")) for e in EventFileLoader(str(path)).Load()]


def test_a_pause_before_a_resume_is_not_part_of_the_time_of_a_run(tmp_path):
    directory = tmp_path / "run"
    log_run(directory, [1.0] * 4).close()
    (file,) = directory.glob("*tfevents*")
    hour = 3600.0
    _move_back(file, hour)  # as if the run had stopped an hour ago
    log_run(directory, [2.0, 2.0], first=4).close()
    times = {event.step: event.wall_time for event in _events(directory) if event.summary.value and event.step}
    assert sorted(times) == [1, 2, 3, 4, 5]
    assert times[3] - 1e-3 <= times[4] < times[3] + 60.0 and times[4] <= times[5]


def _move_back(file, seconds):
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    data, events, at = file.read_bytes(), [], 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 8], "little")
        events.append(Event.FromString(data[at + 12 : at + 12 + length]))
        at += 16 + length
    with file.open("wb") as out:
        writer = RecordWriter(out)
        for event in events:
            event.wall_time -= seconds
            writer.write(event.SerializeToString())


@pytest.mark.parametrize("loader", LOADERS)
def test_the_server_shows_the_page_of_a_run_its_histograms_and_its_dashboard(tmp_path, loader):
    logdir = tmp_path / "runs"
    model = torch.nn.Linear(4, 1)
    spec = "clip_grad_norm(1.0) | adamw(lr=warmup(cosine(1e-2), 0.1)) | lookahead(k=2) | monitor(histograms=True)"
    opt = metaopt.build(model.parameters(), spec, log=logdir / "run", log_every=1, total_steps=10)
    for _ in range(4):
        opt.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        opt.step()
    opt.close()
    with tensorboard(logdir, loader) as server:
        texts = server.get("plugin/text/tags")["run"]
        assert {f"metaopt/{name}/text_summary" for name in ("stack", "parts", "groups")} <= set(texts)
        assert "metaopt/schedule/lr" in server.get("plugin/images/tags")["run"]
        assert {"monitor/weights", "monitor/changes"} <= set(server.get("plugin/histograms/tags")["run"])
        weights = server.get("plugin/histograms/histograms", run="run", tag="monitor/weights")
        assert [step for _, step, _ in weights] == [1, 2, 3, 4]
        assert all(round(sum(count for _, _, count in buckets)) == 5 for _, _, buckets in weights)
        layout = server.get("plugin/custom_scalars/layout")
        titles = [category["title"] for category in layout["category"]]
        assert titles == ["training", "rates", "clipping", "slow weights", "layers"]
        stack = server.get("plugin/text/text", run="run", tag="metaopt/stack/text_summary")
        assert len(stack) == 1 and "clip_grad_norm" in stack[0]["text"]
