"""`metaopt bench`: a table and a file, rounds that are interleaved, mistakes in one line."""

import json
from functools import partial

import pytest
import torch
import warm

from metaopt.cli import main
from metaopt.lab.shapes import make_tensor_set
from metaopt.lab.timing import Runner, count_updates, cycle_of, ratios, spread, time_interleaved

WHOLE = "clip_grad_norm(1.0) | adamw | lookahead(k=5)"


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_json(tmp_path):
    arguments = ["bench", WHOLE, "adamw | ema", "--shapes", "tiny", "--rounds", "2", "--threads", "1"]
    status, out, errors = warm.run([*arguments, "--json", "found.json"], tmp_path)
    assert (status, errors) == (0, "")
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    text = WHOLE.replace("|", "\\|")  # as a cell of Markdown
    assert rows[2].startswith(f"| {text} | ") and len(rows) == 4
    assert "fewer than 20 rounds" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(tmp_path.iterdir()) == [tmp_path / "found.json"]
    assert found["format"] == 1 and found["machine"]["dtype"] == "float32" and found["machine"]["threads"] == 1
    result = found["shapes"]["tiny"]
    assert (result["tensors"], result["elements"], result["rounds"]) == (6, 26122, 2)
    stack, average = result["rows"]
    assert (stack["spec"], stack["base"], average["base"]) == (WHOLE, "adamw", "adamw")
    assert 0 < stack["seconds"]["low"] <= stack["seconds"]["median"] <= stack["seconds"]["high"]
    # both are measured beside one and the same base
    assert stack["base_seconds"] == average["base_seconds"]
    # AdamW keeps two moments and a count for each tensor, Lookahead the slow weights
    counts = 4 * result["tensors"]
    assert stack["base_state_bytes"] == 2 * result["parameter_bytes"] + counts
    assert stack["state_bytes"] == 3 * result["parameter_bytes"] + counts


def test_every_measurement_is_made_once_in_every_round_in_changing_order():
    calls = []

    def make(key):
        calls.append(f"make {key}")
        return lambda: calls.append(key) or len(calls)

    rounds = []
    results = time_interleaved({k: partial(make, k) for k in "abc"}, 8, 2, lambda: rounds.append(len(calls)))
    assert {key: len(values) for key, values in results.items()} == {"a": 8, "b": 8, "c": 8}
    # the second half works on parameters that are made again
    assert [i for i, call in enumerate(calls) if call == "make a"] == [0, 3 + 4 * 3]
    blocks = ["".join(calls[begin : begin + 3]) for begin in rounds]
    assert all(sorted(block) == ["a", "b", "c"] for block in blocks) and len(set(blocks)) > 2


def test_a_ratio_is_taken_inside_each_round():
    # the machine is ten times slower in the second round: the ratio does not change
    assert vars(ratios([2.0, 20.0, 2.0], [1.0, 10.0, 1.0])) == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert vars(spread([1.0, 2.0, 3.0, 4.0, 5.0])) == {"median": 3.0, "low": 2.0, "high": 4.0}


def test_a_sample_has_whole_windows_of_accumulated_gradients():
    runner = Runner("accumulate(7) | adamw | lookahead(k=2)", make_tensor_set("tiny"))
    assert cycle_of(runner.stack) == 14


def test_every_update_gets_the_same_gradients_and_a_sample_has_whole_cycles():
    tensors = make_tensor_set("tiny")
    runner = Runner("clip_grad_value(1e-4) | sgd(lr=1.0) | lookahead(k=7)", tensors)
    assert cycle_of(runner.stack) == 7 and count_updates(tensors, 7) == 63
    seen = []
    step = runner.step
    runner.step = lambda: seen.append([p.grad.clone() for _, p in runner.parameters]) or step()
    runner.measure(3)
    assert len(seen) == 3
    assert all(torch.equal(a, b) for grads in seen for a, b in zip(grads, tensors.gradients, strict=True))


def test_the_bare_base_makes_the_updates_of_the_base_without_wrappers():
    tensors = make_tensor_set("tiny")
    whole = Runner("clip_grad_norm(1.0) | adamw | lookahead(k=1)", tensors)
    bare = Runner("clip_grad_norm(1.0) | adamw | lookahead(k=1)", tensors, bare=True)
    alone = Runner("adamw", tensors)
    for runner in (whole, bare, alone):
        runner.measure(2)
    weights, wrapped, plain = ([p for _, p in runner.parameters] for runner in (bare, whole, alone))
    assert all(torch.equal(p, q) for p, q in zip(weights, plain, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(weights, wrapped, strict=True))


def test_the_bare_base_of_a_partition_is_all_of_its_bases():
    spec = "partition({'*.weight': sgd(lr=0.1, momentum=0.9) | ema(0.9), '*': adamw})"
    bare = Runner(spec, make_tensor_set("tiny"), bare=True)
    keys = {name: set(bare.optimizer.state[p]) for name, p in bare.parameters}
    assert keys["layers.0.weight"] == {"momentum_buffer"}
    assert keys["layers.0.bias"] == {"step", "exp_avg", "exp_avg_sq"}


def test_a_wrapper_that_evaluates_the_loss_gets_gradients_at_each_evaluation():
    tensors = make_tensor_set("tiny")
    runner = Runner("sam | sgd(lr=0.1)", tensors)
    runner.measure(2)
    assert all(not torch.equal(p, w) for (_, p), w in zip(runner.parameters, tensors.weights, strict=True))


def called(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    printed = capsys.readouterr()
    return int(exit.value.code or 0), printed.out, printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adamw", "--shapes", "tinny"], "Did you mean tiny?"),
        (["adamw", "--shapes", "tiny", "--rounds", "0"], "--rounds"),
        (["adamw", "--shapes", "tiny", "--device", "gpux"], "--device gpux"),
        (["adamw", "--shapes", "tiny", "--dtype", "int8"], "float32"),
        (["adamw", "--shapes", "tiny", "--threads", "0"], "--threads"),
        (["adamw", "--shapes", "tiny", "--json", "nowhere/found.json"], "nowhere/found.json"),
        (["adamw | lookahed"], "Did you mean lookahead?"),
        (["adamw(lr=-1.0)"], "learning rate"),
        (["lbfgs"], "lbfgs"),
        (["adamw", "--shapes", "tiny", "--plugin", "no_such_module_anywhere"], "no_such_module_anywhere"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = called(capsys, "bench", *arguments)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert message in err
