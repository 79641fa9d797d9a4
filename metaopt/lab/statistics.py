"""What paired runs can show: interval, sign-flip test, correction for many contenders, and the limits of all three.

A run that diverged has an infinite loss: worse than every finite one, and as bad as any other that diverged. Where one
of a pair of contenders has such a run, both statistics are taken on ranks, in which infinity is only the last place.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import stats

LEVEL = 0.05
# up to this many seeds all sign choices are tried; beyond it a sample of them
EXACT_UP_TO = 20
DRAWS = 99_999

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True)
class Verdict:
    """One contender against the baseline: difference in loss (negative is better), its interval, p and a word.

    `difference` is the mean over seeds; `by_ranks`, where a run of the two diverged, it is the pseudo-median.
    `smallest` is the least difference that this run could have shown: infinite with too few seeds, nan by ranks.
    """

    difference: float
    low: float
    high: float
    p: float
    corrected_p: float
    smallest: float
    by_ranks: bool
    word: str


def verdicts(losses: Sequence[Sequence[float]], baseline: int = 0) -> list[Verdict | None]:
    """Return a verdict per contender (None for the baseline) from its losses per seed, paired by seed.

    "better" and "worse" need both: a 95% interval without zero, and p at most 0.05 after Holm's correction.
    """
    others = [i for i in range(len(losses)) if i != baseline]
    differences = {i: paired_differences(losses[i], losses[baseline]) for i in others}
    ranked = {i: not all(map(math.isfinite, (*losses[i], *losses[baseline]))) for i in others}
    ps = [sign_flip_p(signed_ranks(differences[i]) if ranked[i] else differences[i]) for i in others]
    found: list[Verdict | None] = [None] * len(losses)
    for i, p, corrected in zip(others, ps, holm(ps), strict=True):
        d = differences[i]
        low, high = rank_interval(d) if ranked[i] else paired_interval(d)
        difference = pseudo_median(d) if ranked[i] else float(np.mean(d))
        shown = (low > 0 or high < 0) and corrected <= LEVEL
        word = ("better" if high < 0 else "worse") if shown else "no difference shown"
        smallest = math.nan if ranked[i] else smallest_difference(d, len(others))
        found[i] = Verdict(difference, low, high, p, corrected, smallest, ranked[i], word)
    return found


def paired_differences(losses: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Return a - b for every seed; of two runs that diverged neither is worse."""
    return [0.0 if a == b else a - b for a, b in zip(losses, baseline, strict=True)]


def paired_interval(differences: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Return Student's interval of the mean of paired differences, 95% by default."""
    mean = float(np.mean(differences))
    half = _half_width(differences, level)
    return mean - half, mean + half


def _half_width(differences: Sequence[float], level: float) -> float:
    n = len(differences)
    return _students_quantile(n, level) * float(np.std(differences, ddof=1)) / math.sqrt(n)


@cache
def _students_quantile(n: int, level: float) -> float:
    return float(stats.t.ppf(1 - level / 2, n - 1))


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the two-sided p of the sign-flip test: the share of all 2^n sign choices as extreme as the data.

    With more than `EXACT_UP_TO` differences p is (1 + those as extreme) / (1 + DRAWS) of random choices, seeded.
    """
    values = np.asarray(differences, dtype=float)
    extreme = np.abs(_sums_of_flips(values)) >= abs(values.sum()) * (1 - 1e-12)
    return float(np.mean(extreme)) if len(values) <= EXACT_UP_TO else (1 + int(extreme.sum())) / (1 + DRAWS)


def _sums_of_flips(values: Floats) -> Floats:
    """Return the sum under every choice of signs, the first sign kept: by symmetry it may; or under random choices."""
    if len(values) > EXACT_UP_TO:
        return _drawn_signs(len(values)) @ values
    sums = values[:1]
    for value in values[1:]:
        sums = np.concatenate((sums + value, sums - value))
    return sums


@cache
def _drawn_signs(n: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    return np.random.default_rng(0).choice((1.0, -1.0), size=(DRAWS, n))


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
    below = np.cumsum(_rank_sum_law(n))
    cut = int(np.searchsorted(below, level / 2, side="right"))
    return (float(means[cut - 1]), float(means[-cut])) if cut else (-math.inf, math.inf)


def _pair_means(differences: Sequence[float]) -> Floats:
    # one that diverged against one of the other's that did: they cancel, as two equal ranks do
    means = [0.0 if a == -b else (a + b) / 2 for a, b in itertools.combinations_with_replacement(differences, 2)]
    return np.sort(means)


def _rank_sum_law(n: int) -> Floats:
    """Return the probability of every sum of the positive ranks, 0 to n (n + 1) / 2, where signs are chance."""
    law = np.ones(1)
    for rank in range(1, n + 1):
        law = (np.pad(law, (0, rank)) + np.pad(law, (rank, 0))) / 2
    return law


def holm(ps: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, step down. Holm 1979"""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = largest
    return corrected


def fewest_seeds(contenders: int, level: float = LEVEL) -> int:
    """Return how many seeds a verdict takes at least: the smallest exact p is 2 / 2^n, times the contenders."""
    return next(n for n in itertools.count(2) if contenders * 2.0 / 2**n <= level)


def smallest_difference(differences: Sequence[float], contenders: int) -> float:
    """Return the least mean difference that runs spread like these show, in both directions; infinite with too few."""
    if len(differences) < fewest_seeds(contenders):
        return math.inf
    spread = np.asarray(differences) - np.mean(differences)
    # the strictest of Holm's steps: the contender may be the only one that differs
    level = LEVEL / contenders
    least = max(_least_significant(spread, level), _least_significant(-spread, level))
    return max(least, _half_width(differences, LEVEL))


def _least_significant(spread: Floats, level: float) -> float:
    """Return the mean m from which on the sign-flip p of `spread + m` is at most `level`.

    A choice of signs s is as extreme as the data where |s . spread + m sum(s)| >= m n: up to one m of its own.
    """
    n = len(spread)
    sums, signs = _sums_of_flips(spread), _sums_of_flips(np.ones(n))
    with np.errstate(divide="ignore", invalid="ignore"):
        until = np.maximum(sums / (n - signs), -sums / (n + signs))
    until[np.abs(signs) == n] = math.inf  # the data themselves, and their mirror
    allowed = level * len(until) if n <= EXACT_UP_TO else level * (1 + DRAWS) - 1
    return float(np.sort(until)[::-1][math.floor(allowed)])
