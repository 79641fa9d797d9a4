"""The numbers of a comparison over several problems, by numpy and scipy from those of each problem."""

import itertools
import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
from scipy import stats

# intervals are over studies that are drawn again, problem by problem; p over labels that are exchanged
DRAWS, EXCHANGES, SEED = 1000, 1999, 0
# a problem counts up to so many times the best contender's evaluations
MOST = 4.0

Studies = list[list[float]]  # of one problem: a row of studies for each contender


def of_problems(found: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Return scores, ranks, evaluations saved and the winner from what `of_comparison` gives for each problem."""
    specs = list(found[0])
    times = [[problem[spec]["reached"] for spec in specs] for problem in found]
    losses = [[problem[spec]["losses"] for spec in specs] for problem in found]
    scores, drawn = _scores(times), [_scores(_chosen(times, picks)) for picks in _draws(times)]
    ranks, drawn_ranks = _ranks(losses), [_ranks(_chosen(losses, picks)) for picks in _draws(losses)]
    contenders = []
    for number, spec in enumerate(specs):
        middles = [median(problem[number]) for problem in times]
        baseline = found[0][spec]["verdict"] is None
        contenders.append(
            {
                "spec": spec,
                "score": _estimate(scores[number], [draw[number] for draw in drawn]),
                "solved": sum(map(math.isfinite, middles)),
                "rank": _estimate(ranks[number], [draw[number] for draw in drawn_ranks]),
                "evaluations_saved": None if baseline else _saved([problem[spec]["shares_saved"] for problem in found]),
            }
        )
    return {"contenders": contenders, "winner": _winner(specs, times, scores, drawn)}


def _scores(times: Sequence[Studies]) -> list[float]:
    """Return each contender's area under its performance profile from 1 to 4, as a share of the whole."""
    return _of_middles([[median(studies) for studies in problem] for problem in times])


def _of_middles(times: Sequence[Sequence[float]]) -> list[float]:
    ratios = []
    for middles in times:
        best = min(middles)
        ratios.append([middle / best if math.isfinite(middle) else math.inf for middle in middles])
    return [_area([problem[contender] for problem in ratios]) for contender in range(len(ratios[0]))]


def _area(ratios: Sequence[float]) -> float:
    """Return the integral of a step function: the share of ratios that are at most tau, for tau from 1 to 4."""
    steps = [1.0, *sorted(r for r in ratios if r < MOST), MOST]
    shares = [sum(r <= low for r in ratios) / len(ratios) for low in steps[:-1]]
    widths = [high - low for low, high in itertools.pairwise(steps)]
    return math.fsum(share * width for share, width in zip(shares, widths, strict=True)) / (MOST - 1.0)


def _ranks(losses: Sequence[Studies]) -> list[float]:
    """Return each contender's rank within a study, averaged over studies and then over problems."""
    each = [np.mean([stats.rankdata(study) for study in zip(*problem, strict=True)], axis=0) for problem in losses]
    return [float(rank) for rank in np.mean(each, axis=0)]


def _saved(shares: Sequence[list[float]]) -> dict[str, float]:
    def value(of: Sequence[Studies]) -> float:
        return sum(median(problem[0]) for problem in of) / len(of)

    rows = [[row] for row in shares]
    return _estimate(value(rows), [value(_chosen(rows, picks)) for picks in _draws(rows)])


def _draws(problems: Sequence[Studies]) -> Sequence[Sequence[Any]]:
    """Return for each draw which studies it takes of each problem, with replacement."""
    random = np.random.default_rng(SEED)
    drawn = [random.integers(len(p[0]), size=(DRAWS, len(p[0]))).tolist() for p in problems]
    return list(zip(*drawn, strict=True))


def _chosen(problems: Sequence[Studies], picks: Sequence[Sequence[int]]) -> list[Studies]:
    return [[[row[i] for i in pick] for row in problem] for problem, pick in zip(problems, picks, strict=True)]


def _estimate(value: float, drawn: Sequence[float]) -> dict[str, float]:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"value": value, "low": float(low), "high": float(high)}


def _winner(specs: list[str], times: list[Studies], scores: list[float], drawn: list[list[float]]) -> str | None:
    """Return the best by score, if an interval without zero and p say so of each other one."""
    best = max(range(len(specs)), key=lambda contender: scores[contender])
    for other in range(len(specs)):
        if other == best:
            continue
        if np.quantile([draw[best] - draw[other] for draw in drawn], 0.025) <= 0.0:
            return None
        gaps = [abs(score[best] - score[other]) for score in map(_of_middles, _exchanged(times, best, other))]
        if (1 + sum(gap >= scores[best] - scores[other] - 1e-12 for gap in gaps)) / (1 + EXCHANGES) > 0.05:
            return None
    return specs[best]


def _exchanged(times: list[Studies], a: int, b: int) -> Any:
    """Yield the middle times with the labels of two contenders exchanged, in studies that are chosen at random."""
    random = np.random.default_rng(SEED)
    drawn = []
    for problem in map(np.array, times):
        flips = random.random((EXCHANGES, problem.shape[1])) < 0.5
        exchanged = np.tile(problem, (EXCHANGES, 1, 1))
        exchanged[:, [a, b]] = np.where(flips[:, None], exchanged[:, [b, a]], exchanged[:, [a, b]])
        drawn.append(exchanged)
    for number in range(EXCHANGES):
        yield [[median(row) for row in problem[number].tolist()] for problem in drawn]
