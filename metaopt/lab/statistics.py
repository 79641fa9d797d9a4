"""What paired studies can show: an exact test on signed ranks, its interval, a correction for many contenders.

Everything that gives a verdict is taken on ranks, always. A study that got worse then never helps its contender,
however much worse it got, and a study that diverged (infinite) is only the last place.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from scipy import stats

LEVEL = 0.05

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True)
class Verdict:
    """One contender against the baseline: difference (negative is better), its interval, p and a word.

    `difference` is the pseudo-median of the paired differences, with the interval of Wilcoxon's signed ranks; `mean` is
    their mean, with Student's interval: infinite where a study diverged. `superiority` is the share of studies in which
    the contender is better, ties counted half. `level` is what `corrected_p` is held against.
    """

    difference: float
    low: float
    high: float
    mean: float
    mean_low: float
    mean_high: float
    superiority: float
    p: float
    corrected_p: float
    level: float
    word: str


def verdicts(scores: Sequence[Sequence[float]], baseline: int = 0, level: float = LEVEL) -> list[Verdict | None]:
    """Return a verdict per contender (None for the baseline) from its scores per study, paired; less is better.

    "better" and "worse" need both: an interval without zero at 1 - `level`, and a p of at most `level` after Holm's
    correction for the number of contenders.
    """
    others = [i for i in range(len(scores)) if i != baseline]
    differences = {i: paired_differences(scores[i], scores[baseline]) for i in others}
    ps = [signed_rank_p(differences[i]) for i in others]
    found: list[Verdict | None] = [None] * len(scores)
    for i, p, corrected in zip(others, ps, holm(ps), strict=True):
        d = differences[i]
        low, high = rank_interval(d, level)
        shown = (low > 0 or high < 0) and corrected <= level
        word = ("better" if high < 0 else "worse") if shown else "no difference shown"
        superiority = float(np.mean([(x < 0) + 0.5 * (x == 0) for x in d]))
        found[i] = Verdict(
            pseudo_median(d), low, high, *mean_interval(d, level), superiority, p, corrected, level, word
        )
    return found


def paired_differences(scores: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Return a - b for every study; of two that diverged neither is worse."""
    return [0.0 if a == b else a - b for a, b in zip(scores, baseline, strict=True)]


def mean_interval(differences: Sequence[float], level: float = LEVEL) -> tuple[float, float, float]:
    """Return the mean of paired differences and Student's interval, 95% by default; without one if any is infinite."""
    mean = _sum(differences) / len(differences)
    if not all(map(math.isfinite, differences)) or len(differences) < 2:
        return mean, -math.inf, math.inf
    if len(set(differences)) == 1:
        return mean, mean, mean
    half = float(
        _students_quantile(len(differences), level) * np.std(differences, ddof=1) / math.sqrt(len(differences))
    )
    return mean, mean - half, mean + half


@cache
def _students_quantile(n: int, level: float) -> float:
    return float(stats.t.isf(level / 2, n - 1))


def _sum(differences: Sequence[float]) -> float:
    # infinite both ways has no mean
    return math.nan if {math.inf, -math.inf} <= set(differences) else float(np.sum(differences))


def signed_rank_p(differences: Sequence[float]) -> float:
    """Return the two-sided exact p of Wilcoxon's signed ranks over all 2^n sign choices, with ties and zeros.

    Equal sizes share their mean rank; a zero has a rank and no sign (Pratt 1959).
    """
    ranks = signed_ranks(differences)
    # mean ranks are halves: twice them are whole numbers
    sizes = [round(2 * abs(rank)) for rank in ranks if rank != 0.0]
    law = sum_law(sizes)
    positive = sum(round(2 * rank) for rank in ranks if rank > 0)
    smaller = min(positive, sum(sizes) - positive)
    return min(1.0, 2 * float(law[: smaller + 1].sum()))


def signed_ranks(differences: Sequence[float]) -> list[float]:
    """Return the ranks of the sizes with the differences' signs; equal sizes share their mean rank, zero has none."""
    ranks = stats.rankdata(np.abs(differences))
    return [float(rank * np.sign(d)) for rank, d in zip(ranks, differences, strict=True)]


def pseudo_median(differences: Sequence[float]) -> float:
    """Return the median of the means of all pairs (Hodges and Lehmann 1963), infinite where most of them are."""
    means = _pair_means(differences)
    low, high = means[(len(means) - 1) // 2], means[len(means) // 2]
    return float(low if low == high else (low + high) / 2)


def rank_interval(differences: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Return the interval that belongs to Wilcoxon's signed ranks: means of pairs, so far from the ends as p allows."""
    n = len(differences)
    means = _pair_means(differences)
    below = np.cumsum(sum_law(range(1, n + 1)))
    cut = int(np.searchsorted(below, level / 2, side="right"))
    return (float(means[cut - 1]), float(means[-cut])) if cut else (-math.inf, math.inf)


def _pair_means(differences: Sequence[float]) -> Floats:
    # one that diverged against one of the other's that did: they cancel, as two equal ranks do
    first, second = np.triu_indices(len(differences))
    values = np.asarray(differences, dtype=float)
    a, b = values[first], values[second]
    cancel = a == -b
    return np.sort(np.where(cancel, 0.0, (np.where(cancel, 0.0, a) + np.where(cancel, 0.0, b)) / 2))


def sum_law(sizes: Sequence[int]) -> Floats:
    """Return the probability of every sum of the sizes that get a plus, 0 to their total, where signs are chance."""
    return _law(tuple(sorted(sizes)))


@lru_cache(maxsize=4096)
def _law(sizes: tuple[int, ...]) -> Floats:
    law, total = np.zeros(sum(sizes) + 1), 0
    law[0] = 1.0
    for size in sizes:
        law[: total + size + 1] /= 2
        law[size : total + size + 1] = law[size : total + size + 1] + law[: total + 1].copy()
        total += size
    return law


def holm(ps: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, step down. Holm 1979"""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = largest
    return corrected
