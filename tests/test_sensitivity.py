"""`metaopt compare --sensitivity lr,batch_size`: other batch sizes over as many samples, beside the same verdicts."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from metaopt.cli import main
from metaopt.errors import ProblemError
from metaopt.lab import compare
from metaopt.lab.comparison import Comparison
from metaopt.lab.plan import plan_comparison
from metaopt.lab.workers import stored

SPECS = ["sgd(momentum=0.9)", "adamw"]
OPTIONS: dict[str, Any] = {"studies": 6, "trials": 2, "steps": 8}
BOTH = "lr,batch_size"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compare(SPECS, problem="xor", sensitivity=BOTH, out=tmp_path_factory.mktemp("found"), **OPTIONS)


def test_other_batch_sizes_are_half_and_twice_over_as_many_samples_and_their_cost_is_told_before() -> None:
    plan = plan_comparison(problem="xor", specs=SPECS, sensitivity=BOTH, out=Path("nowhere"), **OPTIONS)
    assert [(size, other.problem, other.budget) for size, other in plan.at_sizes] == [
        (16, "xor(batch_size=16)", 16),
        (64, "xor(batch_size=64)", 4),
    ]
    # 2 contenders, 6 studies of 2 trials: 24 runs of 16 and 24 of 4
    told = "Then batch sizes 16 and 64, over as many samples, tuned anew: 48 runs more, 480 gradient evaluations."
    assert told in plan.promise()
    alone = plan_comparison(problem="xor", specs=SPECS, out=Path("nowhere"), **OPTIONS)
    assert alone.at_sizes == () and "batch size" not in alone.promise()


def test_the_runs_are_those_of_a_comparison_with_that_batch_size(found: Comparison) -> None:
    for size, steps in ((16, 16), (64, 4)):
        options = OPTIONS | {"steps": steps}
        plan = plan_comparison(problem=f"xor(batch_size={size})", specs=SPECS, out=found.plan.out, **options)
        # each trial lies where that comparison looks for it
        for position, contender in enumerate(found.at_sizes[size][1]):
            for study in contender.studies:
                for rate, trial in plan.study(position, study.number).items():
                    assert stored(trial, found.plan.out / "trials") == study.trials[rate]
        # samples are held equal
        trials = [trial for contender in found.at_sizes[size][1] for trial in contender.trials]
        assert {trial["evaluations"] * size for trial in trials} == {8 * 32}


def test_the_numbers_are_numpys_from_the_tables_of_trials(found: Comparison) -> None:
    def best(name: str) -> dict[Any, float]:
        rows = list(csv.DictReader((found.folder / name).read_text().splitlines()))
        chosen = [row for row in rows if row["chosen"] == "True"]
        return {(int(r.get("batch_size", 32)), r["contender"], int(r["study"])): float(r["test_loss"]) for r in chosen}

    losses = best("trials.csv") | best("batch_sizes.csv")
    written = json.loads((found.folder / "results.json").read_text())["sensitivity"]["batch_size"]
    assert [(at["batch_size"], at["evaluations"]) for at in written] == [(16, 16), (32, 8), (64, 4)]
    for at in written:
        for entry in at["contenders"]:
            mine = np.array([losses[at["batch_size"], entry["spec"], study] for study in range(6)])
            assert entry["losses"] == pytest.approx(mine.tolist(), rel=1e-6)
            assert entry["median"] == pytest.approx(np.median(mine), rel=1e-6)
            if at["batch_size"] == 32:
                assert "difference" not in entry
                continue
            d = mine - [losses[32, entry["spec"], study] for study in range(6)]
            means = np.sort([(d[i] + d[j]) / 2 for i in range(6) for j in range(i, 6)])
            # of 64 choices of signs one has a sum of ranks of 0, and 1/64 < 2.5% < 2/64
            expected = (np.median(means), means[0], means[-1])
            assert (entry["difference"], entry["low"], entry["high"]) == pytest.approx(expected, rel=1e-6)


def test_the_numbers_on_the_rate_are_the_rise_to_the_neighbours(found: Comparison) -> None:
    written = json.loads((found.folder / "results.json").read_text())["sensitivity"]["lr"]
    for entry, contender in zip(written, found.contenders, strict=True):
        assert entry["factor"] == pytest.approx((0.5 / 1e-3) ** 0.5)
        rises: dict[str, list[float]] = {"lower": [], "higher": []}
        for study in contender.studies:
            low, high = (trial["validation"]["loss"] for trial in study.trials.values())
            rises["lower" if high < low else "higher"].append(abs(high - low))
        for side, values in rises.items():
            assert entry[side] == (pytest.approx(np.median(values)) if values else None)


def test_the_verdicts_and_the_look_are_those_without_it(found: Comparison) -> None:
    alone = compare(SPECS, problem="xor", out=found.plan.out, **OPTIONS)
    try:
        assert alone.verdicts == found.verdicts and alone.level == found.level and not alone.earlier
        assert alone.folder == found.folder
    finally:
        found.save()


def test_report_and_figure_say_it(found: Comparison) -> None:
    report = (found.folder / "report.md").read_text()
    assert "## Sensitivity" in report and "batch size 16 | batch size 32 | batch size 64" in report
    assert "(gradient evaluations: 16 at 16; 8 at 32; 4 at 64)" in report and "(batch_size.png)" in report
    assert (found.folder / "batch_size.png").exists()
    drawn = found.figure("batch_size")
    drawn.draw_without_rendering()
    axes = drawn.axes[0]
    shown = [tick.label1.get_text() for tick in axes.xaxis.get_major_ticks()]
    assert [text for text in shown if text] == ["16", "32", "64"]
    lost = list(found.at_sizes[64][1])
    for trial in lost[0].trials:
        trial["test"], trial["diverged"] = {"loss": None}, True
    found.figure("batch_size").draw_without_rendering()


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_within_the_other_batch_sizes(found: Comparison, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 40:  # of 24, and 48 more
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(SPECS, problem="xor", sensitivity=BOTH, out=tmp_path, progress=stop, **OPTIONS)
    done: list[int] = []
    again = compare(
        SPECS, problem="xor", sensitivity=BOTH, out=tmp_path, progress=lambda d, t: done.append(d), **OPTIONS
    )
    assert done[-1] == 72
    whole = compare(SPECS, problem="xor", sensitivity=BOTH, out=tmp_path / "whole", **OPTIONS)
    for name in ("results.json", "batch_sizes.csv"):
        first, second = ((c.folder / name).read_text() for c in (again, whole))
        texts = [
            re.sub(r'"(seconds|out|process)": [^,\n]+|(?<=,)\d+\.\d+(e-\d+)?(?=,1,fast)', "", t)
            for t in (first, second)
        ]
        assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("problem", "options", "told"),
    [
        ("xor", {"sensitivity": "lr,decay"}, "--sensitivity must be lr, batch_size or lr,batch_size, got lr,decay"),
        ("rosenbrock", {}, "needs a problem that takes batch_size=, rosenbrock does not"),
        ("digits(batch_size=1000)", {}, "a batch of digits(batch_size=2000) does not hold 2000 samples"),
        ("xor", {"steps": 1}, "--steps 1 is less than one batch of 64"),
    ],
)
def test_what_cannot_be_done_is_told_before_anything_runs(problem: str, options: Any, told: str) -> None:
    with pytest.raises(ProblemError, match=re.escape(told)):
        plan_comparison(
            problem=problem, specs=SPECS, out=Path("nowhere"), **{"sensitivity": BOTH, **OPTIONS, **options}
        )


def test_arguments_that_a_problem_has_are_kept() -> None:
    plan = plan_comparison(
        problem="modular_addition(width=8)", specs=SPECS, sensitivity=BOTH, out=Path("nowhere"), **OPTIONS
    )
    assert [other.problem for _, other in plan.at_sizes] == [
        "modular_addition(width=8, batch_size=32)",
        "modular_addition(width=8, batch_size=128)",
    ]


def test_the_command_takes_it_and_json_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", "-o", "sgd(lr=0.1)", "-o", "adam(lr=0.1)", "--studies", "2", "--steps", "4", "--jobs", "1"]
    command += ["--problem", "xor", "--no-tune", "--sensitivity", "batch_size", "--out", str(tmp_path), "--json"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert not ended.value.code
    out, errors = capsys.readouterr()
    assert [at["batch_size"] for at in json.loads(out)["sensitivity"]["batch_size"]] == [16, 32, 64]
    assert "Then batch sizes 16 and 64, over as many samples:" in errors
