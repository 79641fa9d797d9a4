"""A comparison, run for real on a small problem."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
from metaopt import MetaoptError
from metaopt.cli import main
from metaopt.lab.compare import Plan, plan_comparison, run_comparison

SPECS = ("sgd(momentum=0.9)", "sgd(momentum=0.9) | lookahead(k=5)")


def small(out: Path, **changed: Any) -> Plan:
    asked: dict[str, Any] = {
        "problem": "noisy_quadratic",
        "specs": SPECS,
        "baseline": None,
        "seeds": 3,
        "steps": 20,
        "lrs": 3,
        "tune": True,
        "device": "cpu",
    }
    return plan_comparison(**{**asked, "out": out, "jobs": 1, **changed})


def compared(out: Path, *extra: str) -> int:
    arguments = ["compare", "--problem", "noisy_quadratic", "--seeds", "3", "--steps", "20", "--lrs", "3"]
    contenders = [word for spec in SPECS for word in ("-o", spec)]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, *contenders, "--jobs", "1", "--out", str(out), *extra])
    return int(ended.value.code or 0)


def test_every_contender_gets_the_same_trials_and_seeds(tmp_path: Path) -> None:
    first, second = run_comparison(small(tmp_path))
    assert list(first.tuning) == list(second.tuning)
    assert [run["seed"] for run in first.runs] == [run["seed"] for run in second.runs] == [0, 1, 2]
    assert [run["weights"] for run in (first.runs[0], second.runs[0])] == ["fast", "averaged"]


def test_an_interrupted_comparison_runs_only_what_is_missing(tmp_path: Path) -> None:
    before = run_comparison(small(tmp_path))
    finished = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "trials").iterdir()}
    lost = sorted(finished)[0]
    lost.unlink()
    after = run_comparison(small(tmp_path))
    assert [contender.losses for contender in after] == [contender.losses for contender in before]
    rewritten = [path for path, time in finished.items() if os.stat(path).st_mtime_ns != time]
    assert rewritten in ([], [lost])


def test_a_comparison_leaves_report_results_and_pictures(tmp_path: Path) -> None:
    assert compared(tmp_path) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["contenders"]) == 2
    assert "needs at least 6 seeds" in (tmp_path / "report.md").read_text()
    for picture in ("curves.png", "sensitivity.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_fixed_rates_name_no_winner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(tmp_path, "--no-tune") == 0
    assert "rank settings, not optimizers" in capsys.readouterr().out


def test_a_baseline_that_is_no_contender_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MetaoptError, match="no contender"):
        small(tmp_path, baseline="adamw")
