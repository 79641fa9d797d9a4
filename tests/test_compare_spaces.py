"""A contender is tuned within the spaces that its spec writes, with as many gradient evaluations as the others."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from metaopt.errors import ProblemError, SpecError
from metaopt.lab.comparison import Comparison, run_comparison
from metaopt.lab.plan import plan_comparison
from metaopt.lab.report import remarks, rows
from metaopt.lab.results import document, trials_csv

SPACE = "adamw(lr=warmup(cosine(log(1e-3, 1e-1)), 0.1), betas=(choice(0.8, 0.9), 0.999)) | lookahead(k=integers(2, 9))"
SPECS = ["sgd(momentum=0.9)", SPACE, "sgd(lr=0.05, momentum=uniform(0.0, 0.9))"]


def planned(specs: list[str], out: Path, **options: Any) -> Any:
    return plan_comparison(
        problem="noisy_quadratic(dimensions=3)",
        specs=specs,
        out=out,
        # between ends that are given no study moves on
        **({"studies": 3, "trials": 4, "steps": 12, "lr_min": 1e-3, "lr_max": 0.5} | options),
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return run_comparison(planned(SPECS, tmp_path_factory.mktemp("spaces")))


def test_every_contender_has_as_many_trials_and_evaluations(found: Comparison) -> None:
    assert [len(contender.trials) for contender in found.contenders] == [12, 12, 12]
    assert {trial["evaluations"] for contender in found.contenders for trial in contender.trials} == {12}


def test_each_study_looks_elsewhere_in_the_space_and_stays_in_it(found: Comparison) -> None:
    tried = [found.plan.settings(1, number) for number in range(3)]
    assert len({spec for settings in tried for spec in settings}) == 12
    for settings in tried:
        for spec, values in settings.items():
            assert 1e-3 <= values["lr.schedule.start"] <= 1e-1 and 2 <= values["lookahead.k"] <= 9
            assert values["betas[0]"] in (0.8, 0.9)
            assert values["lookahead.k"] == 5 or f"lookahead(k={values['lookahead.k']})" in spec
    # another contender with the same space looks elsewhere: nobody is favoured by where points lie
    assert not set(planned(["sgd", SPACE + " | ema"], found.plan.out).settings(1, 0)) & set(tried[0])


def test_the_report_and_the_table_name_what_was_found(found: Comparison) -> None:
    said = "\n".join(remarks(found))
    assert f"Best settings of {found.plan.specs[1]} over 3 studies: lr.schedule.start " in said
    assert "All trials of a contender took 144 gradient evaluations together." in said
    assert "Tuning replaces" not in said
    table = list(csv.DictReader(io.StringIO(trials_csv(found))))
    of_space = [row for row in table if row["contender"] == found.plan.specs[1]]
    assert len(of_space) == 12 and sum(row["chosen"] == "True" for row in of_space) == 3
    # the rate of a schedule is its largest value
    assert all(1e-4 < float(row["lr"]) <= 1e-1 for row in of_space)
    assert {float(row["lr"]) for row in table if row["contender"] == found.plan.specs[2]} == {0.05}
    assert rows(found)[2]["lr"].startswith("0.05 (0.05 to 0.05)")
    assert json.loads(json.dumps(document(found)))["contenders"][1]["spec"] == found.plan.specs[1]
    found.figure("sensitivity").draw_without_rendering()


def test_memory_is_that_of_the_state(found: Comparison) -> None:
    # three numbers: momentum keeps one for each, AdamW two and a count, lookahead one more
    shown = [row["state"] for row in rows(found)]
    assert shown[0] == "1.00 x parameters"
    (memory,) = {json.dumps(run["memory"]) for run in found.contenders[1].runs}
    assert json.loads(memory) == {"parameters": 24, "state": 72 + 4, "peak": None}
    assert all(float(row["ms per update"]) > 0 for row in rows(found))


def test_the_best_of_a_study_is_the_least_validation_loss(found: Comparison) -> None:
    for study in found.contenders[1].studies:
        losses = {spec: trial["validation"]["loss"] for spec, trial in study.trials.items()}
        assert study.run["spec"] == min(losses, key=lambda spec: losses[spec])


def test_settings_that_take_other_numbers_of_gradients_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match=r"as many gradients for an update, got 1 for .* and 4 for"):
        planned(["sgd", "accumulate(steps=choice(1, 4)) | adam"], tmp_path)


def test_a_space_and_no_tuning_contradict(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="leave --no-tune out"):
        planned(["sgd", "adam(lr=log(1e-3, 1e-1))"], tmp_path, tune=False)
