"""Several problems as numbers: performance profiles, ranks, and what studies say about them. arXiv:2306.07179

`times` holds for each problem an array of contenders by studies: the gradient evaluations to the target, infinite where
a study missed it. A contender's time on a problem is the median over studies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

Numbers = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

# a problem that took longer than so many times the best is not solved; AlgoPerf's limit
MOST = 4.0
RESAMPLED, FLIPPED, SEED = 1000, 1999, 0
LEVEL = 0.05


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval over studies."""

    value: float
    low: float
    high: float


def ratios(times: Sequence[Numbers]) -> Numbers:
    """Return each contender's time over the best one's, a row for each problem; infinite where it was missed."""
    return _to_best(np.stack([np.median(problem, axis=1) for problem in times]))


def profile(found: Numbers, taus: Numbers) -> Numbers:
    """Return for each contender the share of problems that it solved within each multiple of the best's time."""
    shares: Numbers = (found[:, :, None] <= taus + 1e-12).mean(axis=0)
    return shares


def scores(found: Numbers) -> Numbers:
    """Return the area under each contender's profile from 1 to 4 over that of a perfect one."""
    areas: Numbers = np.clip((MOST - found) / (MOST - 1.0), 0.0, 1.0).mean(axis=-2)
    return areas


def score_estimates(times: Sequence[Numbers]) -> list[Estimate]:
    """Return the score of each contender with its interval."""
    return _estimates(scores(ratios(times)), scores(_resampled_ratios(times)))


def profile_band(times: Sequence[Numbers], taus: Numbers) -> tuple[Numbers, Numbers]:
    """Return the quartiles of each contender's profile over resampled studies."""
    drawn = _resampled_ratios(times)
    shares = np.stack([(drawn <= tau + 1e-12).mean(axis=1) for tau in taus], axis=-1)
    low, high = np.quantile(shares, [0.25, 0.75], axis=0)
    return low, high


def rank_estimates(losses: Sequence[Numbers]) -> list[Estimate]:
    """Return each contender's mean rank by loss within a study, over studies and problems, with its interval."""
    ranks = [np.apply_along_axis(stats.rankdata, 0, problem) for problem in losses]
    value = np.mean([problem.mean(axis=1) for problem in ranks], axis=0)
    drawn = np.mean([problem[:, chosen].mean(axis=-1).T for problem, chosen in _choices(ranks)], axis=0)
    return _estimates(value, drawn)


def mean_estimate(medians_of: Sequence[Numbers]) -> Estimate:
    """Return the mean over problems of the medians over studies, with its interval; each problem a row of studies."""
    rows = [problem[None] for problem in medians_of]
    value = np.mean([np.median(problem, axis=1) for problem in rows], axis=0)
    drawn = np.mean([np.median(problem[:, chosen], axis=-1).T for problem, chosen in _choices(rows)], axis=0)
    return _estimates(value, drawn)[0]


def difference(times: Sequence[Numbers], a: int, b: int) -> tuple[Estimate, float]:
    """Return by how much a's score exceeds b's, with its interval, and p: the labels of a pair of studies exchanged."""
    score = scores(ratios(times))
    drawn = scores(_resampled_ratios(times))
    estimate = _estimates(np.array([score[a] - score[b]]), (drawn[:, a] - drawn[:, b])[:, None])[0]
    random = np.random.default_rng(SEED)
    flipped = []
    for problem in times:
        change = random.random((FLIPPED, problem.shape[1])) < 0.5
        middle = np.tile(np.median(problem, axis=1), (FLIPPED, 1))
        for one, other in ((a, b), (b, a)):
            middle[:, one] = np.median(np.where(change, problem[other], problem[one]), axis=1)
        flipped.append(_to_best(middle))
    swapped = scores(np.stack(flipped, axis=1))
    as_large = np.abs(swapped[:, a] - swapped[:, b]) >= abs(estimate.value) - 1e-12
    return estimate, float((1 + as_large.sum()) / (1 + FLIPPED))


def winner(times: Sequence[Numbers]) -> int | None:
    """Return the contender whose score exceeds every other's by its interval and its p, or None."""
    score = scores(ratios(times))
    best = int(np.argmax(score))
    for other in range(len(score)):
        if other != best:
            by, p = difference(times, best, other)
            if p > LEVEL or by.low <= 0.0:
                return None
    return best


def _to_best(middle: Numbers) -> Numbers:
    best = middle.min(axis=1, keepdims=True)
    return np.where(np.isfinite(middle), middle / np.where(np.isfinite(best), best, 1.0), np.inf)


def _choices(problems: Sequence[Numbers]) -> list[tuple[Numbers, np.ndarray]]:
    random = np.random.default_rng(SEED)
    return [(p, random.integers(p.shape[1], size=(RESAMPLED, p.shape[1]))) for p in problems]


def _resampled_ratios(times: Sequence[Numbers]) -> Numbers:
    """Return the ratios of resampled studies: draws, problems, contenders."""
    drawn = [_to_best(np.median(problem[:, chosen], axis=-1).T) for problem, chosen in _choices(times)]
    return np.stack(drawn, axis=1)


def _estimates(values: Numbers, drawn: Numbers) -> list[Estimate]:
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return [Estimate(float(v), float(a), float(b)) for v, a, b in zip(values, low, high, strict=True)]
