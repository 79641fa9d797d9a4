"""A comparison in Python, as data, and over several problems."""

import ast
import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
from benchmarks import recompute, recompute_one, recompute_overall
from metaopt.cli import main
from metaopt.errors import LogError, ProblemError
from metaopt.lab import compare
from metaopt.lab.comparison import Comparison, judge
from metaopt.lab.figures import log_ticks

SPECS = ["sgd(momentum=0.9)", "adamw", "sgd"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compare(SPECS, problem="xor", studies=8, trials=2, steps=25, out=tmp_path_factory.mktemp("found"))


def as_it_ran(found: Comparison, random: np.random.Generator) -> None:
    pass


def some_met_the_target(found: Comparison, random: np.random.Generator) -> None:
    """Let half of the studies meet the target, few different times among them: ties, and studies that missed it."""
    for trial in (t for c in found.contenders for t in c.trials):
        trial["reached"] = int(random.integers(1, 6)) if random.random() < 0.5 else None


def one_is_later_always(found: Comparison, random: np.random.Generator) -> None:
    for number, contender in enumerate(found.contenders):
        for at, trial in enumerate(contender.trials):
            trial["reached"] = 10 + at if number < 2 else None


def some_diverged(found: Comparison, random: np.random.Generator) -> None:
    """Lose trials of all contenders: whole studies of some, also in the same study as the baseline's."""
    for contender in found.contenders:
        for study in contender.studies:
            for trial in study.trials.values():
                if study.number % 3 == 0 or random.random() < 0.3:
                    trial |= {"validation": {"loss": None}, "test": {"loss": None}, "diverged": True, "reached": None}
                    trial["curve"] = [*trial["curve"][:-1], [trial["curve"][-1][0], None]]


def some_are_equal(found: Comparison, random: np.random.Generator) -> None:
    for trial in (t for c in found.contenders for t in c.trials):
        for split in ("validation", "test"):
            trial[split]["loss"] = round(trial[split]["loss"], 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [as_it_ran, some_met_the_target, one_is_later_always, some_diverged, some_are_equal],
    ids=lambda f: f.__name__,
)
def test_every_number_follows_from_the_table_of_trials_by_scipy(found: Comparison, change: Any, tmp_path: Path) -> None:
    other = copy.deepcopy(found)
    change(other, np.random.default_rng(0))
    judge(other)
    other.save(tmp_path)
    assert list(recompute.disagreements(tmp_path)) == []
    if change is one_is_later_always:
        assert recompute_one.of_comparison(tmp_path)["sgd"]["target_verdict"]["word"] == "worse"


def test_the_recomputation_sees_another_number(found: Comparison, tmp_path: Path) -> None:
    found.save(tmp_path)
    written = json.loads((tmp_path / "results.json").read_text())
    written["contenders"][1]["verdict"]["low"] *= 1 + 1e-5
    written["contenders"][2]["verdict"]["word"] = "better than ever"
    (tmp_path / "results.json").write_text(json.dumps(written))
    report = (tmp_path / "report.md").read_text()
    (tmp_path / "report.md").write_text(report.replace("% of studies", "% of all", 1))
    told = [line.split(" is ")[0] for line in recompute.disagreements(tmp_path)]
    assert told == ["adamw: verdict.low", "adamw: better in", "sgd: verdict.word"]


def test_nothing_of_metaopt_has_a_part_in_the_recomputation() -> None:
    for module in (recompute, recompute_one, recompute_overall):
        tree = ast.parse(Path(str(module.__file__)).read_text())
        names = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        names += [alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names]
        assert not [name for name in names if str(name).split(".")[0] == "metaopt"]


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
