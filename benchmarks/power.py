"""`python -m benchmarks.power`: how often a comparison gives a verdict, by simulation, true and false ones.

Studies of all contenders share a part, so that they are paired; one contender differs from the baseline by an effect in
standard deviations of the paired differences. Prints the table of docs/guides/comparing.md.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from metaopt.lab.looks import auto_looks, pocock
from metaopt.lab.statistics import LEVEL, sum_law

Numbers = np.ndarray[tuple[int, int, int], np.dtype[np.float64]]

EFFECTS = (0.5, 1.0, 2.0)
CONTENDERS = (2, 4, 6)
FIXED = 10


def simulate(contenders: int, effect: float, looks: Sequence[int], comparisons: int) -> tuple[float, float, float]:
    """Return the share of comparisons with any false verdict, with the true one, and the mean number of studies."""
    random = np.random.default_rng([contenders, round(10 * effect), *looks])
    level = pocock(tuple(looks)) if len(looks) > 1 else LEVEL
    # two of unit variance less one another have a standard deviation of sqrt(2)
    scores = random.normal(size=(comparisons, contenders, looks[-1])) + random.normal(size=(comparisons, 1, looks[-1]))
    scores[:, 1] += effect * math.sqrt(2.0)
    shown = np.zeros((comparisons, contenders - 1), dtype=bool)
    studies = np.zeros(comparisons)
    goes_on = np.ones(comparisons, dtype=bool)
    for size in looks:
        shown[goes_on] = all_shown(scores[goes_on, :, :size], level)
        studies[goes_on] = size
        goes_on &= ~shown.all(axis=1)
    false = shown.any(axis=1) if effect == 0.0 else shown[:, 1:].any(axis=1)
    return float(false.mean()), float(shown[:, 0].mean()), float(studies.mean())


def all_shown(scores: Numbers, level: float) -> Any:
    """Return, for comparisons x contenders x studies without ties, which contenders `verdicts` calls different."""
    differences = scores[:, 1:] - scores[:, :1]
    n, others = differences.shape[2], differences.shape[1]
    ranks = np.abs(differences).argsort(axis=2).argsort(axis=2) + 1
    positive = (ranks * (differences > 0)).sum(axis=2)
    tail = np.cumsum(sum_law(range(1, n + 1)))
    ps = np.minimum(1.0, 2 * tail[np.minimum(positive, n * (n + 1) // 2 - positive)])
    order = ps.argsort(axis=1)
    corrected = np.maximum.accumulate(np.take_along_axis(ps, order, 1) * np.arange(others, 0, -1), axis=1)
    shown = np.empty_like(ps, dtype=bool)
    np.put_along_axis(shown, order, corrected <= level, 1)
    return shown


def table(comparisons: int) -> list[str]:
    """Return the lines of the table."""
    head = ["contenders", "studies", "false verdicts", *(f"shown at {effect:g}" for effect in EFFECTS)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for contenders in CONTENDERS:
        for looks in ((FIXED,), auto_looks(contenders - 1)):
            name = str(FIXED) if len(looks) == 1 else f"auto ({', '.join(map(str, looks))})"
            cells = [str(contenders), name, f"{simulate(contenders, 0.0, looks, comparisons)[0]:.1%}"]
            for effect in EFFECTS:
                _, shown, studies = simulate(contenders, effect, looks, comparisons)
                cells.append(f"{shown:.0%}" + (f" with {studies:.1f}" if len(looks) > 1 else ""))
            lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.power", description=__doc__)
    parser.add_argument("--comparisons", type=int, default=2000)
    print(*table(parser.parse_args().comparisons), sep="\n")
