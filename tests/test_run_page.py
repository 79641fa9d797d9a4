"""The page of a run: what a log shows before the first point."""

import inspect
import json
import struct

import pytest
import torch

import metaopt
from metaopt import Histogram, Logger, Table
from metaopt.metrics import Metrics
from metaopt.registry import registry


class Pages(Logger):
    """Keeps all that it is given."""

    def __init__(self):
        self.opened, self.texts_, self.tables_, self.images_, self.layouts = [], {}, {}, {}, []
        self.points, self.histograms_ = [], []

    def open(self, *, step, tags, spec, hparams):
        self.opened.append((step, spec, dict(hparams)))

    def scalars(self, step, values):
        self.points.append((step, dict(values)))

    def histograms(self, step, values):
        self.histograms_.append((step, dict(values)))

    def texts(self, step, values):
        self.texts_.update(values)

    def tables(self, step, values):
        self.tables_.update(values)

    def images(self, step, values):
        self.images_.update(values)

    def layout(self, panels):
        self.layouts.append(panels)


class OnlyNumbers(Logger):
    """A logger as it was written before there were pages."""

    def __init__(self):
        self.points = []

    def open(self, *, step, tags, spec, hparams):
        pass

    def scalars(self, step, values):
        self.points.append((step, dict(values)))


def run(spec, log, *, updates=2, total_steps=100, model=None):
    torch.manual_seed(0)
    model = model or torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
    opt = metaopt.build(model.parameters(), spec, log=log, log_every=1, total_steps=total_steps)
    for _ in range(updates):
        opt.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        opt.record(loss=loss)
        opt.step()
    opt.close()
    return opt


def stack_of(spec, **keywords):
    log = Pages()
    run(spec, log, **keywords)
    return json.loads(log.texts_["metaopt/stack"])


def test_a_logger_that_takes_only_numbers_goes_on_working():
    log = OnlyNumbers()
    run("clip_grad_norm(1.0) | adamw(lr=warmup(cosine(1e-2), 0.1)) | lookahead(k=5)", log)
    assert [step for step, _ in log.points] == [1, 2]


def test_the_stack_is_written_as_json_part_by_part():
    stack = stack_of("clip_grad_norm(1.0) | adamw(lr=warmup(cosine(1e-2), 0.1)) | lookahead(k=3)")
    names = [(part["name"], part["kind"], part["acts_on"]) for part in stack["parts"]]
    assert names == [
        ("clip_grad_norm", "wrapper", "gradients"),
        ("adamw", "optimizer", "parameters"),
        ("lookahead", "wrapper", "parameters"),
    ]
    clip, base, lookahead = stack["parts"]
    assert clip["hyperparameters"] == {"max_norm": 1.0, "norm_type": 2.0}
    assert clip["given"] == ["max_norm"]
    assert clip["measures"] == ["clip_grad_norm/clipped_fraction"]
    assert base["scheduled"] == {"lr": "warmup(schedule=cosine(start=0.01), steps=0.1)"}
    assert base["hyperparameters"]["betas"] == [0.9, 0.999]
    assert "fused" not in base["hyperparameters"]
    assert lookahead["hyperparameters"]["alpha"] == 0.5
    assert "parts" in stack and metaopt.build([torch.zeros(1)], stack["spec"], total_steps=9)


def test_a_partition_is_written_with_its_branches():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
    log = Pages()
    opt = metaopt.build(model, "partition({'0.*': sgd(lr=0.1), '*': adamw(lr=1e-3)})", log=log, log_every=1)
    model(torch.randn(2, 4)).sum().backward()
    opt.step()
    (partition,) = json.loads(log.texts_["metaopt/stack"])["parts"]
    assert {name: [part["name"] for part in own] for name, own in partition["branches"].items()} == {
        "0.*": ["sgd"],
        "*": ["adamw"],
    }
    # columns of a table of runs: each base's settings under the name of its part
    assert {"0.*.lr", "*.lr"} <= log.opened[0][2].keys()


def test_hyperparameters_of_a_run_have_the_names_that_were_written():
    log = Pages()
    run("adamw(lr=cosine(1e-2)) | lookahead(k=3)", log)
    hparams = log.opened[0][2]
    assert hparams["lr"] == "cosine(start=0.01)"
    assert hparams["weight_decay"] == 0.01
    assert hparams["lookahead.k"] == 3


def test_a_schedule_is_drawn_over_the_whole_run():
    pytest.importorskip("matplotlib")
    log = Pages()
    run("adamw(lr=warmup(cosine(1e-2), 0.1)) | lookahead(alpha=linear(0.2, 0.8))", log)
    assert log.images_.keys() == {"metaopt/schedule/lr", "metaopt/schedule/lookahead.alpha"}
    for png in log.images_.values():
        assert png.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", png[16:24])
        assert width > height > 100


def test_a_schedule_without_an_end_is_not_drawn():
    log = Pages()
    run("adamw(lr=inverse_sqrt(1e-2, 10))", log, total_steps=None)
    assert log.images_ == {}


def test_groups_and_defaults_are_shown_as_tables():
    log = Pages()
    run("adamw(lr=1e-2) | lookahead(k=3)", log)
    parts, groups = log.tables_["metaopt/parts"], log.tables_["metaopt/groups"]
    assert parts.columns == ("part", "written", "left at the default")
    assert parts.rows[1][:2] == ("lookahead", "k=3")
    assert groups.columns[:4] == ("group", "tensors", "elements", "rate")
    assert groups.rows[0][:4] == ("0", "4", "19", "0.01")


def test_a_dashboard_is_laid_out_once_with_what_the_stack_has():
    log = Pages()
    run("clip_grad_norm(1.0) | adamw(lr=1e-2) | lookahead(k=3)", log)
    (layout,) = log.layouts
    assert list(layout) == ["training", "rates", "clipping", "slow weights"]
    assert layout["slow weights"] == {"lookahead/distance": ["lookahead/distance"]}


def test_every_scheduled_hyperparameter_is_a_curve_of_its_own():
    log = Pages()
    spec = "adamw(lr=cosine(0.1), weight_decay=linear(0.2, 0.0), betas=(linear(0.9, 0.8), 0.99)) | lookahead(alpha={})"
    run(spec.format("linear(0.5, 1.0)"), log, updates=3, total_steps=10)
    # at a point the values of its update, as the rate's
    for count, (_, values) in enumerate(log.points):
        assert values["train/weight_decay"] == pytest.approx(0.2 - 0.02 * count)
        assert values["train/betas/0"] == pytest.approx(0.9 - 0.01 * count) and values["train/betas/1"] == 0.99
        assert values["lookahead/alpha"] == pytest.approx(0.5 + 0.05 * count)
    (layout,) = log.layouts
    assert layout["rates"] == {
        "learning rate": ["train/learning_rate"],
        "weight_decay": ["train/weight_decay"],
        "betas": ["train/betas"],
        "lookahead.alpha": ["lookahead/alpha"],
    }
    base, lookahead = json.loads(log.texts_["metaopt/stack"])["parts"]
    assert base["values"] == {"weight_decay": "train/weight_decay", "betas": "train/betas"}
    assert lookahead["values"] == {"alpha": "lookahead/alpha"}


def test_groups_with_schedules_of_their_own_have_curves_of_their_own():
    log, model = Pages(), torch.nn.Linear(4, 3)
    decays = [metaopt.linear(0.2, 0.0), metaopt.linear(0.4, 0.0)]
    named = zip(("a", "b"), model.parameters(), decays, strict=True)
    groups = [{"name": name, "params": [p], "weight_decay": decay} for name, p, decay in named]
    opt = metaopt.build(groups, "adamw(lr=0.1) | ema(decay=linear(0.5, 0.9))", log=log, log_every=1, total_steps=11)
    model(torch.ones(2, 4)).sum().backward()
    opt.step()
    ((_, values),) = log.points
    assert (values["train/weight_decay/group a"], values["train/weight_decay/group b"]) == (0.2, pytest.approx(0.4))
    assert values["ema/decay"] == 0.5 and "train/weight_decay" not in values
    opt.close()


def test_a_table_becomes_markdown():
    table = Table(("a", "b"), (("x | y", 0.123456), (1, None)))
    assert table.markdown() == "| a | b |\n| --- | --- |\n| x \\| y | 0.1235 |\n| 1 | - |"


def test_what_a_wrapper_says_it_measures_is_what_it_logs():
    for name, spec in {
        "clip_grad_norm": "clip_grad_norm(1.0) | sgd(lr=0.1)",
        "zclip": "zclip(warmup=1) | sgd(lr=0.1)",
        "clip_update_norm": "sgd(lr=0.1) | clip_update_norm(1.0)",
        "lookahead": "sgd(lr=0.1) | lookahead(k=1)",
        "skip_spikes": "skip_spikes(window=2) | sgd(lr=0.1)",
    }.items():
        log = Pages()
        opt = run(spec, log, updates=4)
        logged = {tag for _, values in log.points for tag in values if tag.startswith(f"{name}/")}
        (wrapper,) = opt.wrappers
        assert logged == {f"{name}/{measure}" for measure in wrapper.measures}, name


def test_every_wrapper_that_measures_says_what():
    for entry in registry.entries("wrapper"):
        measures = ".measure(" in inspect.getsource(inspect.getmodule(entry.target))
        assert measures == bool(entry.target.measures) or entry.target.observes, entry.name


def test_histograms_and_numbers_of_tensors_wait_for_the_point():
    log = Pages()
    metrics = Metrics(log, every=2)
    for update in (1, 2):
        metrics.measure_tensors("m/norm", ["a", "b", "c"], torch.tensor([1.0, 3.0, 2.0]) * update, most=1)
        metrics.measure_histogram("m/weights", [0.0, 1.0, 2.0], torch.tensor([3, 4]))
        metrics.end_update(update)
    assert log.points == [(2, {"m/norm/a": 2.0, "m/norm/b": 6.0})]
    assert log.histograms_ == [(2, {"m/weights": Histogram((0.0, 1.0, 2.0), (3.0, 4.0))})]
    assert metrics.latest() == {"m/norm/a": 2.0, "m/norm/b": 6.0}


def test_a_tensor_that_was_once_shown_stays_and_nan_is_the_largest():
    log = Pages()
    metrics = Metrics(log, every=1)
    names = ["a", "b", "c", "d"]
    for update, values in enumerate(([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, float("nan")]), 1):
        metrics.measure_tensors("n", names, torch.tensor(values), most=1)
        metrics.end_update(update)
    assert log.points[0] == (1, {"n/a": 1.0, "n/d": 4.0})
    assert list(log.points[1][1]) == ["n/a", "n/c", "n/d"]
