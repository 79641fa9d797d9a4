"""The tab "Stack" as the real server sends it: what was logged is read back over HTTP."""

import json
import urllib.error
from importlib.metadata import entry_points
from pathlib import Path

import metaopt_tensorboard
import pytest
import torch
from metaopt_tensorboard.descriptions import read_spec, read_stack, read_verdicts
from tensorboard_server import LOADERS, tensorboard
from torch.utils.tensorboard import SummaryWriter

import metaopt

SPEC = "clip_grad_norm(1.0) | adamw(lr=warmup(cosine(0.01), 0.2)) | lookahead(k=2)"
MARKUP = "<img src=x onerror=alert(1)>"
STACK = {
    "spec": "clip_grad_norm | partition(...)",
    "parts": [
        {"name": "clip_grad_norm", "label": "clip", "kind": "wrapper", "hyperparameters": {"max_norm": float("inf")}},
        {
            "name": "partition",
            "kind": "optimizer",
            "branches": {
                "10": [{"name": "sgd", "kind": "optimizer", "hyperparameters": {"lr": 0.1, "betas": [0.9, 0.99]}}],
                "2": [{"name": "adamw", "scheduled": {"lr": "cosine(0.1)"}, "given": ["lr"], "measures": ["layers"]}],
            },
        },
    ],
}
VERDICTS = {
    "baseline": "sgd(lr=0.1)",
    "metric": "test/loss",
    "rows": [
        {"contender": MARKUP, "difference": -0.2, "low": -0.3, "high": -0.1, "p": 0.01, "verdict": "better"},
        {"contender": "sgd", "difference": float("inf"), "low": "-Infinity", "high": None, "p": "x", "verdict": 3},
    ],
}


def train(directory, spec=SPEC, updates=10):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1, bias=False)
    stack = metaopt.build(model, spec, total_steps=updates, log=directory, log_every=2)
    for _ in range(updates):
        stack.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        stack.record(loss=loss)
        stack.step()
    stack.close()


def write(directory, scalars=(), **texts):
    """Write a log as any program can."""
    with SummaryWriter(str(directory)) as writer:
        for name, text in texts.items():
            writer.add_text(f"metaopt/{name}", text if isinstance(text, str) else json.dumps(text))
        for step, tag in enumerate(scalars, 1):
            writer.add_scalar(tag, step / 2, step)


def named(parts, name):
    return next(part for part in parts if part["name"] == name)


def values(part):
    return {row["name"]: row["schedule"] or row["value"] for row in part["hyperparameters"]}


def test_the_entry_point_is_installed():
    assert "metaopt_tensorboard:StackPlugin" in {point.value for point in entry_points(group="tensorboard_plugins")}


@pytest.mark.parametrize("loader", LOADERS)
def test_the_server_sends_the_parts_of_a_real_run_with_their_curves(tmp_path, loader):
    logdir = tmp_path / "runs"
    train(logdir / "first")
    write(logdir / "other program", ["loss"])
    write(logdir / "comparison", verdicts=VERDICTS)
    with tensorboard(logdir, loader) as server:
        listed = server.get("plugins_listing")["metaopt_stack"]
        assert listed["enabled"] and listed["tab_name"] == "Stack"
        kinds = {entry["run"]: entry["kinds"] for entry in server.get("plugin/metaopt_stack/runs")["runs"]}
        assert kinds == {"comparison": ["comparison"], "first": ["stack"]}
        sent = server.get("plugin/metaopt_stack/stack", run="first")
        verdicts = server.get("plugin/metaopt_stack/verdicts", run="comparison")
    assert [part["name"] for part in sent["parts"]] == ["clip_grad_norm", "adamw", "lookahead"]
    assert values(named(sent["parts"], "lookahead"))["k"] == "2"
    assert "cosine" in values(named(sent["parts"], "adamw"))["lr"]
    assert sent["updates"] == 10 and sent["error"] == "" and sent["curves"][0]["tag"] == "train/loss"
    rate = next(row for row in named(sent["parts"], "adamw")["hyperparameters"] if row["name"] == "lr")
    assert [step for step, _ in rate["points"]] == [2, 4, 6, 8, 10] and rate["points"][-1][1] < 0.01
    curves = {curve["name"]: curve["points"] for curve in named(sent["parts"], "lookahead")["curves"]}
    assert [step for step, _ in curves["distance"]] == [2, 4, 6, 8, 10]
    assert [row["contender"] for row in verdicts["rows"]] == [MARKUP, "sgd"]
    assert verdicts["rows"][0]["low"] == -0.3 and verdicts["rows"][1]["difference"] == "Infinity"


@pytest.mark.parametrize("loader", LOADERS)
def test_what_is_damaged_or_hostile_is_told_and_never_an_error_of_the_server(tmp_path, loader):
    logdir = tmp_path / "runs"
    write(logdir / "damaged", ["train/loss"], spec="    sgd(lr=0.1)", stack="{nope")
    write(logdir / "hopeless", ["train/loss"], spec="no spec at all", stack="[]", verdicts="{}")
    write(logdir / MARKUP.replace("/", ""), [MARKUP], stack={"spec": MARKUP, "parts": [{"name": MARKUP}]})
    with tensorboard(logdir, loader) as server:
        damaged = server.get("plugin/metaopt_stack/stack", run="damaged")
        hopeless = server.get("plugin/metaopt_stack/stack", run="hopeless")
        verdicts = server.get("plugin/metaopt_stack/verdicts", run="hopeless")
        hostile = server.get("plugin/metaopt_stack/stack", run=MARKUP)
        answers = [_status(server, path, **query) for path, query in BAD_QUESTIONS]
        types = [_type(server, path) for path in ("runs", "stack.js")]
    assert "metaopt/stack is not JSON" in damaged["error"] and [p["name"] for p in damaged["parts"]] == ["sgd"]
    assert hopeless["parts"] == [] and "cannot be read as a spec" in hopeless["error"]
    assert "rows must be a list" in verdicts["error"] and verdicts["rows"] == []
    assert hostile["parts"][0]["name"] == MARKUP  # as it is: the page makes text of it
    assert answers == [status for _, _, status in map(_expected, BAD_QUESTIONS)]
    # a browser may not take what a log says for a page
    assert types == [("application/json", "nosniff"), ("text/javascript; charset=utf-8", "nosniff")]


BAD_QUESTIONS = [("stack", {}), ("stack", {"run": "nobody"}), ("verdicts", {"run": "damaged"}), ("verdicts", {})]


def _expected(question):
    path, query = question
    return path, query, 404 if "run" in query else 400


def _status(server, path, **query):
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.get(f"plugin/metaopt_stack/{path}", **query)
    refused.value.close()
    return refused.value.code


def _type(server, path):
    with urllib.request.urlopen(f"{server.address}/data/plugin/metaopt_stack/{path}") as answer:
        return answer.headers["Content-Type"], answer.headers["X-Content-Type-Options"]


def test_many_curves_of_one_part_are_sent_when_they_are_asked_for(tmp_path):
    logdir = tmp_path / "runs"
    parts = [{"name": "monitor", "kind": "wrapper", "measures": ["ratio"]}]
    write(logdir / "run", [f"ratio/layer {i}" for i in range(30)], stack={"spec": "monitor", "parts": parts})
    with tensorboard(logdir) as server:
        few = server.get("plugin/metaopt_stack/stack", run="run")["parts"][0]
        every = server.get("plugin/metaopt_stack/stack", run="run", all="monitor")["parts"][0]
    assert (len(few["curves"]), few["more"]) == (8, 22)
    assert (len(every["curves"]), every["more"]) == (30, 0)


def test_a_base_of_a_branch_has_the_rate_of_its_branch(tmp_path):
    logdir = tmp_path / "runs"
    partition = "partition({'weight': sgd(lr=cosine(0.1)), '*': adamw(lr=0.01)})"
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    stack = metaopt.build(model, partition, total_steps=3, log=logdir / "run", log_every=1)
    for _ in range(3):
        model(torch.ones(1, 4)).sum().backward()
        stack.step()
    stack.close()
    with tensorboard(logdir) as server:
        sent = server.get("plugin/metaopt_stack/stack", run="run")
    bases = [branch["parts"][0] for branch in sent["parts"][0]["branches"]]
    rates = [next(row for row in base["hyperparameters"] if row["name"] == "lr") for base in bases]
    assert [row["points"][0][1] for row in rates] == [pytest.approx(0.1), pytest.approx(0.01)]
    assert [base["curves"] for base in bases] == [[], []]  # a rate is drawn once, beside its name


def test_a_description_is_read_with_its_branches_in_order():
    clip, partition = read_stack(json.dumps(STACK))["parts"]
    assert clip["label"] == "clip" and values(clip) == {"max_norm": "inf"}
    assert [branch["pattern"] for branch in partition["branches"]] == ["10", "2"]
    sgd, adamw = (branch["parts"][0] for branch in partition["branches"])
    assert values(sgd) == {"lr": "0.1", "betas": "(0.9, 0.99)"}
    assert values(adamw) == {"lr": "cosine(0.1)"} and not adamw["hyperparameters"][0]["default"]


def test_a_spec_is_read_without_running_it():
    found = read_spec(
        "    clip_grad_norm(max_norm=1.0) | partition({'*.weight': muon | ema, '*': sgd(lr=__import__('os'))})"
    )
    assert [part["name"] for part in found["parts"]] == ["clip_grad_norm", "partition"]
    muon, sgd = found["parts"][1]["branches"]
    assert [part["name"] for part in muon["parts"]] == ["muon", "ema"]
    assert values(sgd["parts"][0]) == {"lr": "__import__('os')"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        "[]",
        "{}",
        '{"parts": 3}',
        '{"parts": [3]}',
        '{"parts": [' + ", ".join(["{}"] * 501) + "]}",
        '{"parts": [{"branches": [{"parts": [{"branches": [{}]}]}]}]}',
        '{"parts": ' + '[{"branches": [{"parts": ' * 20 + "[]" + "}]}]" * 20 + "}",
    ],
)
def test_a_description_of_another_form_is_one_clear_error(text):
    with pytest.raises(ValueError, match=r"metaopt/stack") as raised:
        read_stack(text)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 200


@pytest.mark.parametrize("wrong", [None, 3, "text", [], [1], {"a": {"b": 1}}, True])
@pytest.mark.parametrize("key", ["label", "kind", "hyperparameters", "scheduled", "values", "measures", "given"])
def test_a_field_of_another_type_is_shown_or_left_out(key, wrong):
    part = read_stack(json.dumps({"parts": [{"name": "sgd", key: wrong}]}))["parts"][0]
    assert part["name"] == "sgd" and all(isinstance(tag, str) for tag in part["measures"])
    assert all(isinstance(row[cell], str) for row in part["hyperparameters"] for cell in ("name", "value", "tag"))


@pytest.mark.parametrize("text", ["x" * 3_000_000, "a(" * 5_000, "a |", "", "\0", "1 +"])
def test_a_text_that_is_no_spec_is_one_clear_error(text):
    with pytest.raises(ValueError, match=r"cannot be read as a spec"):
        read_spec(text)


def test_verdicts_are_numbers_or_nothing():
    first, second = read_verdicts(json.dumps(VERDICTS))["rows"]
    assert (first["difference"], first["low"], first["high"], first["p"]) == (-0.2, -0.3, -0.1, 0.01)
    assert (second["low"], second["high"], second["p"], second["verdict"]) == (float("-inf"), None, None, "3")


def test_the_page_makes_no_markup_of_what_it_gets():
    module = (Path(metaopt_tensorboard.__file__).parent / "stack.js").read_text()
    ways = [
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "DOMParser",
        "srcdoc",
        "href",
        "http:",
    ]
    assert [way for way in ways if way in module.replace("http://www.w3.org/2000/svg", "")] == []
