"""A comparison in Python, as data, and over several problems."""

import copy
import csv
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
from scipy import stats

from metaopt.cli import main
from metaopt.errors import LogError, ProblemError
from metaopt.lab import compare
from metaopt.lab.comparison import Comparison, judge
from metaopt.lab.figures import log_ticks

SPECS = ["sgd(momentum=0.9)", "adamw", "sgd"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compare(SPECS, problem="xor", studies=8, trials=2, steps=25, out=tmp_path_factory.mktemp("found"))


def recomputed(path: Path) -> dict[str, dict[str, Any]]:
    """Recompute the verdicts on the loss from trials.csv, by scipy and nothing of metaopt."""
    scores: dict[str, dict[int, tuple[float, float]]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            best = scores.setdefault(row["contender"], {})
            validation, test = float(row["validation_loss"]), float(row["test_loss"])
            study = int(row["study"])
            if study not in best or validation < best[study][0]:
                best[study] = validation, test
    losses = {spec: np.array([best[study][1] for study in sorted(best)]) for spec, best in scores.items()}
    first, *others = losses
    differences = {spec: losses[spec] - losses[first] for spec in others}
    ps = {spec: stats.wilcoxon(d, method="exact").pvalue for spec, d in differences.items()}
    ordered = sorted(others, key=lambda spec: ps[spec])
    results: dict[str, dict[str, Any]] = {}
    corrected = 0.0
    for rank, spec in enumerate(ordered):
        corrected = max(corrected, min(1.0, (len(ordered) - rank) * ps[spec]))
        d = differences[spec]
        pairs = np.sort([(d[i] + d[j]) / 2 for i in range(len(d)) for j in range(i, len(d))])
        # as many pair means are cut off on each side as sums of ranks are this improbable
        cut = next(k for k in range(len(pairs) + 1) if _wilcoxon_tail(k, len(d)) > 0.025)
        student = stats.ttest_1samp(d, 0.0).confidence_interval(0.95)
        results[spec] = {
            "p": ps[spec],
            "corrected_p": corrected,
            "difference": float(np.median(pairs)),
            "low": float(pairs[cut - 1]),
            "high": float(pairs[-cut]),
            "mean": float(d.mean()),
            "mean_low": float(student.low),
            "mean_high": float(student.high),
            "superiority": float(np.mean(d < 0) + np.mean(d == 0) / 2),
        }
    return results


def _wilcoxon_tail(sum_: int, n: int) -> float:
    signs = np.array(np.meshgrid(*[[0, 1]] * n)).reshape(n, -1)
    return float(np.mean(np.arange(1, n + 1) @ signs <= sum_))


def test_the_statistics_are_scipys_from_the_table_of_trials(found: Comparison) -> None:
    expected = recomputed(found.folder / "trials.csv")
    results = json.loads((found.folder / "results.json").read_text())
    for contender in results["contenders"][1:]:
        for name, value in expected[contender["spec"]].items():
            assert contender["verdict"][name] == pytest.approx(value, rel=1e-6), (contender["spec"], name)


def test_a_comparison_in_python_has_verdicts_trials_and_figures(found: Comparison, tmp_path: Path) -> None:
    assert list(found.verdicts) == ["adamw", "sgd"]
    assert found.verdicts["sgd"].word in ("better", "worse", "no difference shown")
    assert len(found.trials) == 3 * 8 * 2
    for name in ("curves", "differences", "sensitivity"):
        assert found.figure(name).axes[0].get_title(loc="left").startswith("xor: ")
    with pytest.raises(ProblemError, match="curves, differences, sensitivity"):
        found.figure("nothing")
    saved = found.save(tmp_path / "elsewhere", figures=["svg", "pdf"])
    assert {path.name for path in saved} >= {"report.md", "trials.csv", "curves.svg", "differences.pdf"}
    with pytest.raises(LogError, match="is there already"):
        found.save(tmp_path / "elsewhere")
    assert "| stack |" in str(found)


def test_contenders_are_told_apart_in_grey(found: Comparison) -> None:
    axes = found.figure("curves").axes[0]
    lines = [line for line in axes.get_lines() if line.get_linestyle() != "None"]
    assert len(lines) == len({line.get_linestyle() for line in lines}) == len(SPECS)
    assert len({line.get_marker() for line in lines}) == len(SPECS)
    # bars of the quartiles, where bands are shades that overlap
    bars = [segment for collection in axes.collections for segment in getattr(collection, "get_segments", list)()]
    assert len(bars) >= 5 * len(SPECS)


def rescaled(found: Comparison, change: Callable[[float], float]) -> Comparison:
    """Return the comparison as if all its losses were others."""
    other = copy.deepcopy(found)
    for contender in other.contenders:
        for trial in contender.trials:
            trial["curve"] = [(at, change(loss)) for at, loss in trial["curve"]]
            for split in ("validation", "test"):
                trial[split]["loss"] = change(trial[split]["loss"])
    judge(other)
    return other


@pytest.mark.parametrize(
    "change",
    [
        lambda loss: loss,
        lambda loss: 1.0 + 1e-3 * loss,  # no power of ten in the range, and no 2 or 5
        lambda loss: 0.31 + 0.02 * loss,
        lambda loss: loss**30,
        lambda loss: -loss,  # no logarithm
        lambda loss: 0.25,  # a range of nothing
    ],
)
def test_every_axis_has_three_readable_ticks(found: Comparison, change: Callable[[float], float]) -> None:
    other = rescaled(found, change)
    for name in ("curves", "differences", "sensitivity"):
        drawn = other.figure(name)
        drawn.draw_without_rendering()
        axes = drawn.axes[0]
        for axis in (axes.xaxis, *([axes.yaxis] if name != "differences" else [])):
            low, high = axis.get_view_interval()
            inside = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            assert 3 <= len({tick.label1.get_text() for tick in inside} - {""}) <= 12
            across = axis is axes.xaxis
            boxes = sorted(
                (box.x0, box.x1) if across else (box.y0, box.y1)
                for box in (tick.label1.get_window_extent() for tick in inside)
            )
            assert all(this[1] < after[0] for this, after in itertools.pairwise(boxes))  # none lies over another


@pytest.mark.parametrize(("low", "high"), [(1e-12, 1e3), (0.9, 1.1), (2.01, 4.99), (1e-3, 0.5), (0.3, 0.45)])
def test_ticks_of_a_logarithmic_axis_are_few_and_round(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert 3 <= len(ticks) <= 8 and low <= ticks[0] < ticks[-1] <= high
    assert all(float(f"{tick:.4g}") == pytest.approx(tick) for tick in ticks)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["compare", "-o", "sgd", "-o", "adam", "--studies", "2", "--trials", "1", "--jobs", "1", *arguments])
    assert not ended.value.code
    return capsys.readouterr().out


def test_json_is_the_file_of_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "--problem", "noisy_quadratic", "--steps", "3", "--json", "--out", str(tmp_path))
    assert json.loads(out) == json.loads((tmp_path / "results.json").read_text())


@pytest.mark.slow
def test_every_problem_that_is_given_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = ["--problem", "noisy_quadratic(dimensions=3)", "--problem", "xor", "--steps", "3"]
    run(capsys, *problems, "--out", str(tmp_path))
    for folder, problem in (("noisy_quadratic-dimensions-3", "noisy_quadratic(dimensions=3)"), ("xor", "xor")):
        assert json.loads((tmp_path / folder / "results.json").read_text())["problem"] == problem
    (overview,) = tmp_path.glob("overview-*.md")
    assert "| stack | noisy_quadratic(dimensions=3) | xor |" in overview.read_text()
    (numbers,) = tmp_path.glob("overview-*.json")
    assert [row["spec"] for row in json.loads(numbers.read_text())["contenders"]] == ["sgd", "adam"]
    assert len(list(tmp_path.glob("overview-*-profile.png"))) == 1
