"""`python -m benchmarks`: a table, a file, whole processes timed, mistakes in one line."""

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.start_up import help_imports_torch, process_seconds, seconds_after

pytestmark = pytest.mark.slow

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


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    arguments = ["--shapes", "tiny", "--rounds", "2", "--threads", "1", "--json", str(tmp_path / "found.json")]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    rows = [line for line in printed.out.splitlines() if line.startswith("| ")]
    assert any(row.startswith("| torch-fused | clip_grad_norm_(1), AdamW(fused=True)") for row in rows)
    assert "fewer than 20 rounds" in printed.out
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "tinny"], "Did you mean tiny?"),
        (["--shapes", "tiny", "--baseline", "torch-fast"], "there is: stack, torch"),
        (["--shapes", "tiny", "--device", "gpux"], "--device gpux"),
        (["--shapes", "tiny", "--json", "nowhere/found.json"], "nowhere/found.json"),
        (["--targets", "--only", "9"], "--only 9"),
        (["--only", "4"], "--targets"),
        (["--shapes", "tiny", "adamw | lookahed"], "Did you mean lookahead?"),
        (["--shapes", "tiny", "lbfgs"], "lbfgs"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert message in printed.err
