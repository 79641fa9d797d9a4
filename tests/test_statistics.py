"""What the statistics of a comparison promise."""

import math

import numpy as np
import pytest

pytest.importorskip("scipy")
from metaopt.lab.statistics import fewest_seeds, holm, paired_interval, sign_flip_p, verdicts


def test_the_interval_is_students() -> None:
    low, high = paired_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302652729911275 / math.sqrt(3), 2 + 4.302652729911275 / math.sqrt(3)))


def test_the_smallest_exact_p_is_two_of_all_sign_choices() -> None:
    assert sign_flip_p([1.0, 2.0, 3.0, 4.0]) == 2 / 2**4


def test_a_difference_of_zero_has_p_one() -> None:
    assert sign_flip_p([0.0] * 5) == 1.0


def test_holm_multiplies_by_what_is_left_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


@pytest.mark.parametrize(("contenders", "seeds"), [(1, 6), (2, 7), (3, 7), (4, 8)])
def test_the_fewest_seeds_follow_from_the_number_of_contenders(contenders: int, seeds: int) -> None:
    assert fewest_seeds(contenders) == seeds


def test_a_clear_difference_is_shown() -> None:
    baseline = np.random.default_rng(0).normal(1.0, 0.1, 10)
    shown = verdicts([list(baseline), list(baseline - 0.5 + 0.01 * np.arange(10))])
    assert shown[0] is None
    assert shown[1] is not None and shown[1].word == "better"


def test_a_thousand_comparisons_without_a_difference_give_few_false_verdicts() -> None:
    random, false = np.random.default_rng(0), 0
    for _ in range(1000):
        # seeds differ much, contenders do not: losses of one seed are paired
        losses = random.normal(1.0, 0.3, 10) + random.normal(0.0, 0.1, (4, 10))
        found = verdicts([list(row) for row in losses])
        false += any(v is not None and v.word in ("better", "worse") for v in found)
    assert false < 65
