"""What the statistics of a comparison promise."""

import itertools
import math
import time

import numpy as np
import pytest

pytest.importorskip("scipy")
from scipy import stats

from metaopt.lab import statistics
from metaopt.lab.statistics import (
    EXACT_UP_TO,
    fewest_seeds,
    holm,
    paired_interval,
    pseudo_median,
    rank_interval,
    sign_flip_p,
    signed_ranks,
    smallest_difference,
    verdicts,
)

INF = math.inf


def test_the_interval_is_students() -> None:
    low, high = paired_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302652729911275 / math.sqrt(3), 2 + 4.302652729911275 / math.sqrt(3)))


def test_the_smallest_exact_p_is_two_of_all_sign_choices() -> None:
    assert sign_flip_p([1.0, 2.0, 3.0, 4.0]) == 2 / 2**4


def test_a_difference_of_zero_has_p_one() -> None:
    assert sign_flip_p([0.0] * 5) == 1.0


@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_p_is_the_share_of_all_sign_choices_as_extreme_as_the_data(n: int) -> None:
    values = np.random.default_rng(n).normal(0.3, 1.0, n)
    sums = [abs(np.dot(signs, values)) for signs in itertools.product((1.0, -1.0), repeat=n)]
    assert sign_flip_p(list(values)) == pytest.approx(np.mean(np.array(sums) >= abs(values.sum()) - 1e-12))


def test_p_of_many_seeds_is_a_sample_and_takes_no_exponential_time() -> None:
    values = np.random.default_rng(0).normal(0.35, 1.0, EXACT_UP_TO + 12)
    begun = time.perf_counter()
    p = sign_flip_p(list(values))
    assert time.perf_counter() - begun < 5.0
    # the sum over random signs is close to normal by then
    expected = 2 * stats.norm.sf(abs(values.sum()) / math.sqrt((values**2).sum()))
    assert p == pytest.approx(expected, rel=0.1)
    assert sign_flip_p(list(values)) == p


def test_the_sample_agrees_with_all_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    values = list(np.random.default_rng(3).normal(0.5, 1.0, 14))
    exact = sign_flip_p(values)
    monkeypatch.setattr(statistics, "EXACT_UP_TO", 13)
    assert sign_flip_p(values) == pytest.approx(exact, abs=4 * math.sqrt(exact / statistics.DRAWS))


def test_no_sample_gives_a_p_of_zero() -> None:
    assert sign_flip_p([1.0] * 40) == 1 / (statistics.DRAWS + 1)


def test_holm_multiplies_by_what_is_left_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


@pytest.mark.parametrize(("contenders", "seeds"), [(1, 6), (2, 7), (3, 7), (4, 8)])
def test_the_fewest_seeds_follow_from_the_number_of_contenders(contenders: int, seeds: int) -> None:
    assert fewest_seeds(contenders) == seeds
    differ = [list(np.arange(seeds) / 1e3)] + [list(1.0 + np.arange(seeds) / 1e3)] * contenders
    assert {v.word for v in verdicts(differ) if v} == {"worse"}
    assert {v.word for v in verdicts([run[1:] for run in differ]) if v} == {"no difference shown"}


def test_a_clear_difference_is_shown() -> None:
    baseline = np.random.default_rng(0).normal(1.0, 0.1, 10)
    shown = verdicts([list(baseline), list(baseline - 0.5 + 0.01 * np.arange(10))])
    assert shown[0] is None
    assert shown[1] is not None and shown[1].word == "better"


@pytest.mark.parametrize("n", [10, EXACT_UP_TO + 5])
def test_the_smallest_difference_is_shown_and_a_smaller_one_is_not(n: int) -> None:
    random = np.random.default_rng(n)
    baseline = random.normal(1.0, 0.3, n)
    noise = random.normal(0.0, 0.1, n)
    found = verdicts([list(baseline), list(baseline + noise), list(baseline)])[1]
    assert found is not None and found.smallest > 0
    for sign, word in ((1, "worse"), (-1, "better")):
        shifted = baseline + noise - noise.mean() + sign * found.smallest * 1.001
        verdict = verdicts([list(baseline), list(shifted), list(baseline)])[1]
        assert verdict is not None and verdict.word == word
    words = set()
    for sign in (1, -1):
        shifted = baseline + noise - noise.mean() + sign * found.smallest * 0.98
        verdict = verdicts([list(baseline), list(shifted), list(baseline)])[1]
        words.add(verdict.word if verdict else "")
    assert "no difference shown" in words


def test_too_few_seeds_show_no_difference_of_any_size() -> None:
    assert smallest_difference([0.1, 0.2, 0.3], 1) == INF


# ---- runs that diverged


def test_signed_ranks_share_ties_and_put_what_diverged_last() -> None:
    assert signed_ranks([0.5, -0.5, -INF, 0.0, 3.0]) == [2.5, -2.5, -5.0, 0.0, 4.0]


def test_p_by_ranks_is_wilcoxons() -> None:
    values = list(np.random.default_rng(1).normal(0.4, 1.0, 12))
    expected = stats.wilcoxon(values, method="exact").pvalue
    assert sign_flip_p(signed_ranks(values)) == pytest.approx(expected)


def test_the_interval_by_ranks_holds_zero_exactly_where_wilcoxon_says_so() -> None:
    random = np.random.default_rng(2)
    seen = set()
    for _ in range(200):
        values = list(random.normal(0.6, 1.0, 11))
        low, high = rank_interval(values)
        without_zero = low > 0 or high < 0
        assert without_zero == (stats.wilcoxon(values, method="exact").pvalue <= 0.05)
        assert low <= pseudo_median(values) <= high
        seen.add(without_zero)
    assert seen == {True, False}


def test_a_contender_that_always_diverges_is_worse_and_the_baseline_that_does_is_beaten() -> None:
    fine, diverged = [1.0 + i / 100 for i in range(8)], [INF] * 8
    (worse,) = [v for v in verdicts([fine, diverged]) if v]
    (better,) = [v for v in verdicts([diverged, fine]) if v]
    assert (worse.word, worse.difference, worse.by_ranks) == ("worse", INF, True)
    assert (better.word, better.difference) == ("better", -INF)


def test_runs_that_diverge_count_against_a_contender_that_is_better_elsewhere() -> None:
    baseline = [1.0 + i / 100 for i in range(10)]
    better = [loss - 0.1 - i / 1e3 for i, loss in enumerate(baseline)]
    assert [v.word for v in verdicts([baseline, better]) if v] == ["better"]
    assert [v.word for v in verdicts([baseline, [INF, INF, *better[2:]]]) if v] == ["no difference shown"]


def test_one_run_that_diverged_does_not_take_the_verdict_of_the_others() -> None:
    baseline = [1.0 + i / 100 for i in range(10)]
    better = [loss - 0.1 - i / 1e3 for i, loss in enumerate(baseline)]
    worse = [loss + 0.1 + i / 1e3 for i, loss in enumerate(baseline)]
    _, first, second, third = verdicts([baseline, better, [INF, *worse[1:]], [INF] * 10])
    assert first and second and third
    assert [v.word for v in (first, second, third)] == ["better", "worse", "worse"]
    assert not first.by_ranks and second.by_ranks
    assert second.low > 0 and math.isfinite(second.low)


def test_two_runs_that_diverged_are_a_tie() -> None:
    runs = [INF, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    (verdict,) = [v for v in verdicts([runs, runs]) if v]
    assert (verdict.difference, verdict.p, verdict.word) == (0.0, 1.0, "no difference shown")


# ---- what must not happen: a winner where there is no difference


def normal(random: np.random.Generator) -> np.ndarray:
    # seeds differ much, contenders do not: losses of one seed are paired
    return random.normal(1.0, 0.3, 10) + random.normal(0.0, 0.1, (4, 10))


def skewed(random: np.random.Generator) -> np.ndarray:
    return np.exp(random.normal(0.0, 1.0, 10) + random.normal(0.0, 1.0, (4, 10)))


def heavy_tailed(random: np.random.Generator) -> np.ndarray:
    return random.standard_cauchy((4, 10))


def sometimes_diverging(random: np.random.Generator) -> np.ndarray:
    return np.where(random.random((4, 10)) < 0.1, INF, normal(random))


def coarse(random: np.random.Generator) -> np.ndarray:
    return random.integers(0, 4, (4, 10)) / 4.0


@pytest.mark.parametrize("losses", [normal, skewed, heavy_tailed, sometimes_diverging, coarse])
def test_a_thousand_comparisons_without_a_difference_give_few_false_verdicts(losses) -> None:  # type: ignore[no-untyped-def]
    random, false = np.random.default_rng(0), 0
    for _ in range(1000):
        found = verdicts([list(row) for row in losses(random)])
        false += any(v is not None and v.word in ("better", "worse") for v in found)
    assert false < 65


def test_the_thousand_comparisons_would_show_a_difference_that_is_there() -> None:
    random, shown = np.random.default_rng(0), 0
    for _ in range(100):
        losses = normal(random)
        losses[1] += 0.25
        found = verdicts([list(row) for row in losses])
        shown += found[1] is not None and found[1].word == "worse"
    assert shown > 90
