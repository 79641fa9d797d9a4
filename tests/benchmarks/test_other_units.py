"""The measurement of false verdicts trains what `metaopt compare` trains."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("scipy")
from benchmarks.other_units import SideBySide, compare_pairs, planned, word_on
from benchmarks.other_units_table import RATES, false_verdicts
from metaopt.lab.named import problem_named
from metaopt.lab.trial import Trial, run_trial


@pytest.mark.slow
@pytest.mark.parametrize(("problem", "steps"), [("xor", 30), ("digits", 8)])
def test_runs_side_by_side_are_the_lab_s_own_runs(problem: str, steps: int) -> None:
    seeds, rates = [3, 3, 4], [0.01, 0.1, 0.05]
    running = SideBySide(problem_named(problem), seeds, rates)
    for _ in range(steps):
        running.update()
    for split in ("validation", "test"):
        alone = [
            run_trial(Trial(problem, f"sgd(lr={rate}, momentum=0.9)", seed, steps, steps, 1, "cpu", ""))[split]["loss"]
            for seed, rate in zip(seeds, rates, strict=True)
        ]
        assert running.losses(split) == pytest.approx(alone, rel=1e-4)


def test_pairs_are_the_same_one_by_one_and_together() -> None:
    plan = planned("xor", 5, studies=3)
    together = compare_pairs(plan, 4, 2)
    assert together[1] == compare_pairs(plan, 5, 1)[0]
    assert [len(losses) for losses in together[0]["losses"]] == [3, 3]
    assert word_on(together[0]) == "no difference shown"


def test_a_unit_far_from_the_range_costs_trials_and_not_the_result() -> None:
    # 1,000 times smaller: all of the range is far too low for it
    (pair,) = compare_pairs(replace(planned("xor", 40, studies=4), trials=4), 1, 1, factor=1000.0)
    low, high = sorted((0, 1), key=lambda position: pair["units"][position])
    assert pair["units"][low] < 0.1 and pair["trials"][low] > pair["trials"][high]
    assert min(pair["losses"][low]) < 0.6


def test_rates_that_move_on_make_units_exchangeable_and_held_ones_do_not() -> None:
    random = np.random.default_rng(0)
    # a valley in the logarithm of the rate, at its bottom a little different for each seed
    losses = (np.log(RATES / 0.15) + 0.2 * random.normal(size=(60, 1))) ** 2 + 0.1 * random.normal(
        size=(60, len(RATES))
    )
    held, least = false_verdicts((losses, losses), 600, 10.0, 0)
    moving, trials = false_verdicts((losses, losses), 600, 10.0, 5)
    assert held > 0.2 and moving < 0.075
    assert least == 5 < trials < 7
