"""Where the trials of a study are: evenly over the space, from a random start of the study's own."""

import hashlib

import numpy as np

Point = tuple[float, ...]


def placed(name: str, trials: int, dimensions: int = 1) -> list[Point]:
    """Return so many points of the unit cube: a lattice, shifted as a whole by random numbers that `name` gives.

    The first coordinate has one point in each of `trials` equal cells; the others follow Kronecker's sequence of the
    generalised golden ratio. Two studies with other names are placed independently, so that no contender is favoured
    by where a grid happens to lie.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    shifts = np.random.default_rng(seed).random(dimensions)
    ratio = _golden(dimensions - 1)
    points = []
    for number in range(trials):
        first = (number + shifts[0]) / trials
        rest = ((number * ratio ** -(axis + 1) + shifts[axis + 1]) % 1.0 for axis in range(dimensions - 1))
        points.append((float(first), *map(float, rest)))
    return points


def _golden(dimensions: int) -> float:
    """Return the root of x^(d + 1) = x + 1: the golden ratio in one dimension."""
    x = 1.5
    for _ in range(64):
        x = (1.0 + x) ** (1.0 / (dimensions + 1))
    return x
