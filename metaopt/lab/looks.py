"""Looking at results more than once: the level of declared looks, and of looks that nobody declared."""

import math
from functools import cache

import numpy as np
from scipy import optimize, stats

from metaopt.lab.power import fewest_studies
from metaopt.lab.statistics import LEVEL

FIRST, BETWEEN, LOOKS = 8, 6, 3
# each look that was not declared has a fifth of the level of the one before: all of them together stay below 6.25%
FALLS_BY = 5.0
# of the integral over a sum: the fourth digit of a level is right by then
NODES = 64


@cache
def pocock(looks: tuple[int, ...], level: float = LEVEL) -> float:
    """Return the level of each look, the same at all, that gives `level` together. doi:10.1093/biomet/64.2.191"""
    if len(looks) == 1:
        return level
    top, bottom = stats.norm.isf(level / 2 / len(looks)), stats.norm.isf(level / 2)
    bound = optimize.brentq(lambda b: _exceeded(looks, b) - level, bottom, top, xtol=1e-5)
    return float(f"{2 * stats.norm.sf(bound):.4f}")


def _exceeded(looks: tuple[int, ...], bound: float) -> float:
    """Return the chance that a sum of normal numbers is, at any look, beyond `bound` of its standard deviations."""
    nodes, shares = np.polynomial.legendre.leggauss(NODES)
    sums, density = np.zeros(1), np.ones(1)
    for step, size in zip(np.diff((0, *looks)), looks, strict=True):
        # what has not been beyond the bound yet, moved by the numbers between two looks
        edge = bound * math.sqrt(size)
        after = edge * nodes
        density = edge * shares * (stats.norm.pdf(after[:, None] - sums[None, :], scale=math.sqrt(step)) @ density)
        sums = after
    return 1.0 - float(density.sum())


def auto_looks(others: int) -> tuple[int, ...]:
    """Return the numbers of studies at which `--studies auto` looks: the first from which a verdict is possible."""
    first = FIRST
    while fewest_studies(others, pocock((first, first + BETWEEN, first + 2 * BETWEEN))) > first:
        first += 1
    return tuple(first + BETWEEN * number for number in range(LOOKS))


def level_after(earlier: int, looks: tuple[int, ...]) -> float:
    """Return the level at looks that come after so many others which did not declare them."""
    return pocock(looks, LEVEL) if not earlier else pocock(looks, LEVEL / math.pow(FALLS_BY, earlier))
