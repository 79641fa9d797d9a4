"""`metaopt bench` as a command: a table, a file, whole processes timed, mistakes in one line."""

import json
import subprocess
import sys

import pytest

from metaopt.cli import main
from metaopt.lab.bench.processes import help_imports_torch, process_seconds, seconds_after

WHOLE = "clip_grad_norm(1.0) | adamw | lookahead(k=5)"


def test_processes_are_timed_and_an_import_of_torch_is_found_out():
    short, long = (process_seconds(["-c", code], rounds=2) for code in ("", "import time; time.sleep(0.5)"))
    assert (len(short), len(long)) == (2, 2)
    assert min(long) > 0.5
    within = seconds_after("json", "time.sleep(0.1)", rounds=2)
    assert len(within) == 2
    assert all(0.1 <= seconds < 5.0 for seconds in within)
    assert not help_imports_torch(["bench", "--help"])
    assert help_imports_torch(["list", "wrappers"])


def test_the_command_prints_a_table_and_writes_json(tmp_path):
    arguments = ["bench", "--shapes", "tiny", "--rounds", "2", "--threads", "1", "--json", "found.json"]
    done = subprocess.run(
        [sys.executable, "-m", "metaopt", *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert any(row.startswith("| torch-fused | clip_grad_norm_(1), AdamW(fused=True)") for row in rows)
    assert "fewer than 20 rounds" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(tmp_path.iterdir()) == [tmp_path / "found.json"]
    assert found["format"] == 1 and found["dtype"] == "float32" and found["machine"]["threads"] == 1
    result = found["sets"]["tiny"]
    assert (result["tensors"], result["elements"], result["rounds"]) == (6, 26122, 2)
    assert result["bandwidth"]["median"] > 0
    by_key = {row["key"]: row for row in result["contenders"]}
    assert by_key["torch-fused"]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    stack = by_key["stack"]
    assert stack["what"] == WHOLE
    assert stack["seconds"]["low"] <= stack["seconds"]["median"] <= stack["seconds"]["high"]
    assert stack["updates_per_sample"] % 5 == 0 and stack["finite"] is True
    assert stack["share_of_step"] is None  # of the transformer alone


def called(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    printed = capsys.readouterr()
    return int(exit.value.code or 0), printed.out, printed.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--shapes", "tinny"], "Did you mean tiny?"),
        (["--shapes", "tiny", "--rounds", "0"], "--rounds"),
        (["--shapes", "tiny", "--baseline", "torch-fast"], "there is: stack, torch"),
        (["--shapes", "tiny", "--device", "gpux"], "--device gpux"),
        (["--shapes", "tiny", "--dtype", "int8"], "float32"),
        (["--shapes", "tiny", "--threads", "0"], "--threads"),
        (["--shapes", "tiny", "--json", "nowhere/found.json"], "nowhere/found.json"),
        (["--targets", "--only", "9"], "--only 9"),
        (["--only", "4"], "--targets"),
        (["--shapes", "tiny", "adamw | lookahed"], "Did you mean lookahead?"),
        (["--shapes", "tiny", "adamw(lr=-1.0)"], "learning rate"),
        (["--shapes", "tiny", "lbfgs"], "lbfgs"),
        (["--shapes", "tiny", "--plugin", "no_such_module_anywhere"], "no_such_module_anywhere"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, monkeypatch, tmp_path, arguments, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    status, out, err = called(capsys, "bench", *arguments)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert told in err
