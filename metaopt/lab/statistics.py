"""What paired runs can show: interval, exact test, correction for many contenders, and the limits of all three."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05


@dataclass(frozen=True)
class Verdict:
    """One contender against the baseline: mean difference in loss (negative is better), interval, p and a word."""

    difference: float
    low: float
    high: float
    p: float
    corrected_p: float
    smallest: float
    word: str


def paired_interval(differences: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Return Student's interval of the mean of paired differences, 95% by default."""
    n = len(differences)
    mean = float(np.mean(differences))
    half = float(stats.t.ppf(1 - level / 2, n - 1) * np.std(differences, ddof=1) / math.sqrt(n))
    return mean - half, mean + half


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the exact two-sided p of the sign-flip test: the share of all 2^n sign choices as extreme as the data."""
    values = np.asarray(differences, dtype=float)
    observed = abs(values.sum())
    # by symmetry the first sign may stay
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(values) - 1))).reshape(-1, len(values) - 1)
    sums = np.abs(values[0] + signs @ values[1:])
    return float(np.mean(sums >= observed * (1 - 1e-12)))


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
    """Return the smallest mean difference that this run could have shown: the half-width at the corrected level."""
    low, high = paired_interval(differences, LEVEL / max(1, contenders))
    return (high - low) / 2


def verdicts(losses: Sequence[Sequence[float]], baseline: int = 0) -> list[Verdict | None]:
    """Return a verdict per contender (None for the baseline) from its losses per seed, paired by seed.

    A run that diverged has an infinite loss: such a pair has no finite difference and leaves no verdict but a count.
    """
    others = [i for i in range(len(losses)) if i != baseline]
    found: list[Verdict | None] = [None] * len(losses)
    differences = {i: [a - b for a, b in zip(losses[i], losses[baseline], strict=True)] for i in others}
    usable = [i for i in others if len(differences[i]) > 1 and all(math.isfinite(d) for d in differences[i])]
    corrected = dict(zip(usable, holm([sign_flip_p(differences[i]) for i in usable]), strict=True))
    for i in others:
        if i not in usable:
            found[i] = Verdict(math.nan, math.nan, math.nan, math.nan, math.nan, math.nan, "no verdict: runs diverged")
            continue
        low, high = paired_interval(differences[i])
        shown = (low > 0 or high < 0) and corrected[i] <= LEVEL
        mean = float(np.mean(differences[i]))
        word = ("better" if mean < 0 else "worse") if shown else "no difference shown"
        smallest = smallest_difference(differences[i], len(others))
        found[i] = Verdict(mean, low, high, sign_flip_p(differences[i]), corrected[i], smallest, word)
    return found
