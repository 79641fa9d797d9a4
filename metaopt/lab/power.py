"""What a number of studies can show, known before anything is trained."""

import itertools
from functools import cache

import numpy as np

from metaopt.lab.statistics import LEVEL, sum_law

POWER = 0.8
DRAWS = 4000
# beyond it nobody waits, and the search ends
MOST_STUDIES = 400


def fewest_studies(others: int, level: float = LEVEL) -> int:
    """Return how many studies a verdict takes at least: the smallest exact p is 2 / 2^n, times the contenders."""
    return next(n for n in itertools.count(2) if others * 2.0 / 2**n <= level)


@cache
def detectable(studies: int, others: int, level: float = LEVEL) -> float | None:
    """Return the difference, in standard deviations of the paired differences, that is shown with a chance of 80%.

    One contender differs from the baseline, and Holm's strictest step is asked for; None with too few studies.
    """
    if studies < fewest_studies(others, level):
        return None
    low, high = 0.0, 16.0
    while high - low > 0.005:
        middle = (low + high) / 2
        low, high = (low, middle) if power(studies, middle, others, level) >= POWER else (middle, high)
    return high


@cache
def studies_for(effect: float, others: int, level: float = LEVEL) -> int:
    """Return how many studies show a difference of so many standard deviations with a chance of 80%."""
    low, high = fewest_studies(others, level), MOST_STUDIES
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, effect, others, level) >= POWER else (middle + 1, high)
    return low


def power(studies: int, effect: float, others: int = 1, level: float = LEVEL) -> float:
    """Return how often a true difference of so many standard deviations is shown, over drawn normal differences."""
    differences = _drawn(studies) + effect
    ranks = np.abs(differences).argsort(axis=1).argsort(axis=1) + 1
    positive = (ranks * (differences > 0)).sum(axis=1)
    tail = np.cumsum(sum_law(range(1, studies + 1)))
    smaller = np.minimum(positive, studies * (studies + 1) // 2 - positive)
    shown = 2 * tail[smaller] * others <= level
    return float(np.mean(shown))


@cache
def _drawn(studies: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    return np.random.default_rng(0).normal(size=(DRAWS, studies))
