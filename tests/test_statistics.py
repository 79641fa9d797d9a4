"""What the statistics of a comparison promise."""

import itertools
import math

import numpy as np
import pytest

pytest.importorskip("scipy")
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks.power import all_shown, simulate
from metaopt.lab.looks import auto_looks, level_after, pocock
from metaopt.lab.power import detectable, fewest_studies, power, studies_for
from metaopt.lab.statistics import (
    LEVEL,
    holm,
    mean_interval,
    pseudo_median,
    rank_interval,
    signed_rank_p,
    signed_ranks,
    verdicts,
)

INF = math.inf


def words(*scores: list[float], level: float = LEVEL) -> list[str]:
    return [v.word for v in verdicts(scores, level=level) if v]


# ---- interval, p, correction


def test_the_interval_of_the_mean_is_students() -> None:
    expected = 2 - 4.302652729911275 / math.sqrt(3), 2 + 4.302652729911275 / math.sqrt(3)
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, *expected))
    assert mean_interval([1.0, INF]) == (INF, -INF, INF)
    assert mean_interval([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)


def test_the_smallest_exact_p_is_two_of_all_sign_choices() -> None:
    assert signed_rank_p([1.0, 2.0, 3.0, 4.0]) == 2 / 2**4


def test_a_difference_of_zero_has_p_one() -> None:
    assert signed_rank_p([0.0] * 5) == 1.0


@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_p_is_the_share_of_all_sign_choices_as_extreme_as_the_data(n: int) -> None:
    # whole numbers: many ties, and some zeros
    values = np.random.default_rng(n).integers(-2, 4, n).astype(float)
    ranks = np.array(signed_ranks(list(values)))
    sums = [abs(np.dot(signs, ranks)) for signs in itertools.product((1.0, -1.0), repeat=n)]
    assert signed_rank_p(list(values)) == pytest.approx(np.mean(np.array(sums) >= abs(ranks.sum()) - 1e-12))


def test_p_is_scipys_with_ties_and_zeros_and_without() -> None:
    random = np.random.default_rng(1)
    every = stats.PermutationMethod(n_resamples=2**9)
    for values in (random.normal(0.4, 1.0, 9), random.integers(-2, 5, 9).astype(float)):
        expected = stats.wilcoxon(values, zero_method="pratt", method=every).pvalue
        assert signed_rank_p(list(values)) == pytest.approx(expected)
    values = random.normal(0.2, 1.0, 40)
    assert signed_rank_p(list(values)) == pytest.approx(stats.wilcoxon(values, method="exact").pvalue)


def test_holm_multiplies_by_what_is_left_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


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


def test_a_clear_difference_is_shown() -> None:
    baseline = np.random.default_rng(0).normal(1.0, 0.1, 10)
    assert words(list(baseline), list(baseline - 0.5 + 0.01 * np.arange(10))) == ["better"]


# ---- what a number of studies can show


@pytest.mark.parametrize(("contenders", "studies"), [(1, 6), (2, 7), (3, 7), (4, 8)])
def test_the_fewest_studies_follow_from_the_number_of_contenders(contenders: int, studies: int) -> None:
    assert fewest_studies(contenders) == studies
    differ = [list(np.arange(studies) / 1e3)] + [list(1.0 + np.arange(studies) / 1e3)] * contenders
    assert set(words(*differ)) == {"worse"}
    assert set(words(*(run[1:] for run in differ))) == {"no difference shown"}


def test_the_difference_that_can_be_shown_is_shown_in_four_of_five_comparisons() -> None:
    assert detectable(5, 1) is None
    for studies, others in ((10, 1), (10, 3), (20, 5)):
        effect = detectable(studies, others)
        assert effect is not None
        random, shown = np.random.default_rng(5), 0
        for _ in range(200):
            # the contenders beside it do not differ: Holm asks for the strictest step
            scores = [[0.0] * studies, *random.normal(0.0, 1.0, (others, studies)).tolist()]
            scores[1] = list(np.array(scores[1]) + effect)
            shown += words(*scores)[0] == "worse"
        assert 0.7 < shown / 200 < 0.9, (studies, others)


def test_more_studies_show_smaller_differences() -> None:
    assert power(10, 0.5) < power(20, 0.5) < power(40, 0.5)
    needed = studies_for(0.5, 1)
    assert power(needed, 0.5) >= 0.8 > power(needed - 1, 0.5)


# ---- looking more than once


def test_the_levels_of_declared_looks_are_pococks() -> None:
    assert [pocock(tuple(range(1, n + 1))) for n in (1, 2, 3, 4, 5)] == pytest.approx(
        [0.05, 0.0294, 0.0221, 0.0182, 0.0158], abs=1e-4
    )


def test_the_first_automatic_look_can_show_something() -> None:
    for others in range(1, 8):
        looks = auto_looks(others)
        assert looks[0] >= fewest_studies(others, pocock(looks))


def false_verdicts(looks: list[int], levels: list[float], contenders: int, comparisons: int) -> float:
    random, false = np.random.default_rng(contenders), 0
    for _ in range(comparisons):
        shared = random.normal(0.0, 1.0, looks[-1])
        scores = random.normal(0.0, 1.0, (contenders, looks[-1])) + shared
        false += any(
            {"better", "worse"} & set(words(*(list(row[:n]) for row in scores), level=level))
            for n, level in zip(looks, levels, strict=True)
        )
    return false / comparisons


@pytest.mark.parametrize("contenders", [2, 4, 6])
def test_declared_looks_keep_their_promise(contenders: int) -> None:
    looks = auto_looks(contenders - 1)
    assert simulate(contenders, 0.0, looks, 2000)[0] <= 0.06
    assert simulate(contenders, 2.0, looks, 500)[1] >= 0.95


def test_the_simulation_says_what_verdicts_says() -> None:
    scores = np.random.default_rng(0).normal(size=(60, 4, 9)) + 0.9 * np.arange(4)[:, None]
    found = [[word != "no difference shown" for word in words(*map(list, one))] for one in scores]
    assert all_shown(scores, LEVEL).tolist() == found
    assert any(map(any, found)) and not all(map(all, found))


@pytest.mark.slow
def test_looks_that_were_not_declared_keep_near_it_however_many_there_are() -> None:
    looks = [10, 15, 20, 30, 40]
    assert [level_after(k, (n,)) for k, n in enumerate(looks)] == pytest.approx([0.05, 0.01, 0.002, 0.0004, 0.00008])
    assert false_verdicts(looks, [level_after(k, (n,)) for k, n in enumerate(looks)], 2, 600) <= 0.075
    assert false_verdicts(looks, [0.05] * 5, 2, 600) > 0.1


# ---- studies that diverged


def test_signed_ranks_share_ties_and_put_what_diverged_last() -> None:
    assert signed_ranks([0.5, -0.5, -INF, 0.0, 3.0]) == [2.5, -2.5, -5.0, 0.0, 4.0]


def test_a_contender_that_always_diverges_is_worse_and_the_baseline_that_does_is_beaten() -> None:
    fine, diverged = [1.0 + i / 100 for i in range(8)], [INF] * 8
    (worse,) = [v for v in verdicts([fine, diverged]) if v]
    (better,) = [v for v in verdicts([diverged, fine]) if v]
    assert (worse.word, worse.difference, worse.superiority) == ("worse", INF, 0.0)
    assert (better.word, better.difference, better.superiority) == ("better", -INF, 1.0)


def test_studies_that_diverge_count_against_a_contender_that_is_better_elsewhere() -> None:
    baseline = [1.0 + i / 100 for i in range(10)]
    better = [loss - 0.1 - i / 1e3 for i, loss in enumerate(baseline)]
    assert words(baseline, better) == ["better"]
    assert words(baseline, [INF, INF, *better[2:]]) == ["no difference shown"]


@pytest.mark.parametrize("blown", [1.0, 1e3, 1e6, 8.2e14, INF])
def test_a_contender_that_is_worse_stays_worse_however_much_one_study_blows_up(blown: float) -> None:
    baseline = [1.0 + i / 100 for i in range(10)]
    worse = [loss + 0.1 + i / 1e3 for i, loss in enumerate(baseline)]
    assert words(baseline, worse) == words(baseline, [worse[0] + blown, *worse[1:]]) == ["worse"]
    # and what blows up is the baseline: the contender stays better
    assert words(worse, baseline) == words([worse[0] + blown, *worse[1:]], baseline) == ["better"]


ORDER = ["better", "no difference shown", "worse"]


@settings(deadline=None)
@given(st.lists(st.integers(-6, 6), min_size=7, max_size=12), st.data())
def test_a_study_that_gets_worse_never_helps(differences: list[int], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(differences) - 1))
    more = data.draw(st.sampled_from([1, 2, 5, 1e6, INF]))
    before = [float(d) + 0.01 * i for i, d in enumerate(differences)]  # no ties
    after = [d + more if i == at else d for i, d in enumerate(before)]
    zero = [0.0] * len(before)
    assert ORDER.index(words(zero, after)[0]) >= ORDER.index(words(zero, before)[0])
    # the same for the baseline, the other way round
    assert ORDER.index(words(after, zero)[0]) <= ORDER.index(words(before, zero)[0])


def test_two_studies_that_diverged_are_a_tie() -> None:
    scores = [INF, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    (verdict,) = [v for v in verdicts([scores, scores]) if v]
    assert (verdict.difference, verdict.p, verdict.superiority) == (0.0, 1.0, 0.5)
    assert verdict.word == "no difference shown"


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


@pytest.mark.slow
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
