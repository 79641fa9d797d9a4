"""Studies whose best rate is outermost go on beyond their range."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest

pytest.importorskip("scipy")
from metaopt.lab.comparison import Comparison, run_comparison
from metaopt.lab.moving import outermost
from metaopt.lab.plan import Plan, plan_comparison
from metaopt.lab.report import remarks

SPECS = ("sgd(momentum=0.9)", "sgd(momentum=0.9, dampening=0.0)")


def planned(
    out: Path, lowest: float, highest: float, given: tuple[bool, bool] = (False, False), trials: int = 3
) -> Plan:
    plan = plan_comparison(problem="noisy_quadratic", specs=SPECS, studies=3, trials=trials, steps=15, out=out)
    return dataclasses.replace(plan, lowest=lowest, highest=highest, given=given)


def losses_of(study) -> list[float]:  # type: ignore[no-untyped-def]
    found = [trial["validation"]["loss"] for trial in study.trials.values()]
    return [math.inf if loss is None else loss for loss in found]


def beyond(comparison: Comparison) -> int:
    return sum(len(study.trials) - 3 for contender in comparison.contenders for study in contender.studies)


@pytest.mark.parametrize("range_", [(0.005, 0.05), (0.25, 2.5)])
def test_a_study_moves_on_until_both_neighbours_of_its_best_rate_are_worse(
    tmp_path: Path, range_: tuple[float, float]
) -> None:
    comparison = run_comparison(planned(tmp_path, *range_))
    step = (range_[1] / range_[0]) ** (1 / 3)
    for contender in comparison.contenders:
        assert contender.edge is None
        for study in contender.studies:
            rates, losses = [rate or 0.0 for rate in study.trials], losses_of(study)
            assert 3 <= len(rates) <= 6 and rates == sorted(rates)
            assert all(b / a == pytest.approx(step, rel=0.02) for a, b in itertools.pairwise(rates))
            assert 0 < losses.index(min(losses)) < len(losses) - 1
            assert all(trial["seed"] == study.number for trial in study.trials.values())
    assert beyond(comparison)
    said = next(remark for remark in remarks(comparison) if "went on beyond it" in remark)
    assert f"{sum(len(s.trials) - 3 for s in comparison.contenders[0].studies)} of {SPECS[0]}" in said


def test_rates_move_no_further_than_their_number_and_the_range_is_called_too_small(tmp_path: Path) -> None:
    comparison = run_comparison(planned(tmp_path, 1e-7, 1e-6))
    assert {contender.edge for contender in comparison.contenders} == {"highest"}
    assert all(len(s.trials) == 6 for c in comparison.contenders for s in c.studies)


@pytest.mark.parametrize(("given", "moves"), [((True, True), False), ((False, True), False), ((True, False), True)])
def test_an_end_that_a_user_gave_is_kept(tmp_path: Path, given: tuple[bool, bool], moves: bool) -> None:
    comparison = run_comparison(planned(tmp_path, 0.005, 0.05, given))
    assert bool(beyond(comparison)) == moves
    assert {contender.edge for contender in comparison.contenders} == {None if moves else "highest"}


def test_two_rates_have_no_inside(tmp_path: Path) -> None:
    assert dataclasses.replace(planned(tmp_path, 1e-3, 1e-2), trials=2).moves == 0


def test_ends_that_are_given_are_ends_and_defaults_are_where_it_begins(tmp_path: Path) -> None:
    asked = {"problem": "noisy_quadratic", "specs": SPECS, "steps": 5, "out": tmp_path}
    assert plan_comparison(**asked).given == (False, False)  # type: ignore[arg-type]
    assert plan_comparison(**asked, lr_max=0.5).given == (False, True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("losses", "side"),
    [
        ([1.0, 2.0, 3.0], -1),
        ([3.0, 2.0, 1.0], 1),
        ([2.0, 1.0, 2.0], 0),
        ([1.0, 1.0, 2.0], 0),  # the neighbour is as good
        ([math.inf] * 3, -1),
        ([1.0, math.inf, math.inf], -1),
        ([math.inf, math.inf, 1.0], 1),
    ],
)
def test_the_outermost_rate_is_the_best_one_alone(losses: list[float], side: int) -> None:
    assert outermost(losses) == side
