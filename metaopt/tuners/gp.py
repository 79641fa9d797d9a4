"""Bayesian search: a Gaussian process of the losses so far chooses the next setting."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

from metaopt import MissingExtra, Space, Task, Tried, Tuner, hookimpl, hyper

Point = tuple[float, ...]

# trials between two looks at the losses: so many processes are busy at a time
ROUND = 2
# settings among which a trial is chosen: evenly spread ones, and steps around the best so far of two lengths
EVEN, AROUND = 512, 256
STEPS = (0.03, 0.1)
# losses are compared as log(floor + excess over the best / that of the middle one), no excess above CUT middle ones;
# the floor falls from one of these to the other: a search looks for the valley first, then for its deepest place
FLOORS, CUT = (0.5, 0.1), 20.0
# the kernel's length for an axis is between these: a shorter one makes a search creep
LENGTHS = (0.1, 3.0)
# what counts as an improvement, in deviations of the compared losses
LEAST = 0.1


class GP(Tuner):
    """Evenly spread settings, then those from which a Gaussian process expects the largest improvement.

    The process has a Matern kernel with a length for each axis, fitted anew in every round, of the logarithm of the
    losses' excess over the best. doi:10.1023/A:1008306431147, arXiv:1206.2944
    """

    known_as = ("bayesian", "GPSampler", "gp_minimize", "expected_improvement")
    spread: float = hyper(0.33, gt=0.0, le=1.0, doc="the share of the trials that are spread evenly, before the others")

    def run(self, task: Task) -> list[Tried]:
        spaces = list(task.spaces.values())
        process = _process(len(_features(spaces, [0.5] * len(spaces))))
        even = min(task.trials, max(2, round(self.spread * task.trials)))
        tried = [Tried(point) for point in task.points(even)]
        losses = task.losses(tried)
        while len(tried) < task.trials:
            count = min(ROUND, task.trials - len(tried))
            floor = FLOORS[0] * (FLOORS[1] / FLOORS[0]) ** ((len(tried) - even) / (task.trials - even))
            found = _comparable(losses, floor)
            step = [Tried(point) for point in _promising(process, spaces, tried, found, count, task.seed)]
            tried += step
            losses += task.losses(step)
        return tried


def _promising(
    process: Any, spaces: Sequence[Space], tried: Sequence[Tried], losses: Sequence[float], count: int, seed: int
) -> list[Point]:
    """Return points of large expected improvement; the second takes the first to have come out as expected."""
    import numpy as np
    from scipy.stats import norm
    from sklearn.base import clone

    points = [each.point for each in tried]
    best = points[losses.index(min(losses))]
    candidates = _candidates(best, np.random.default_rng([seed, len(points)]))
    known, found = np.array([_features(spaces, point) for point in points]), np.array(losses)
    features = np.array([_features(spaces, point) for point in candidates])
    process = _fitted(clone(process), known, found)
    chosen: list[Point] = []
    for _ in range(count):
        if chosen:
            process = process.set_params(kernel=process.kernel_, optimizer=None).fit(known, found)
        mean, deviation = process.predict(features, return_std=True)
        better = found.min() - mean - LEAST
        z = better / np.maximum(deviation, 1e-9)
        expected = better * norm.cdf(z) + deviation * norm.pdf(z)
        # a setting that was tried teaches nothing, and of a space of a few options many points are the same one
        new = ~(features[:, None] == known[None]).all(axis=2).any(axis=1)
        position = int(np.argmax(np.where(new, expected, expected - 1e9) if new.any() else expected))
        chosen.append(candidates[position])
        known, found = np.vstack([known, features[position]]), np.append(found, mean[position])
    return chosen


def _candidates(best: Point, random: Any) -> list[Point]:
    """Return points of the unit cube: everywhere, and around the best."""
    import numpy as np

    everywhere = random.random((EVEN, len(best)))
    around = [best + random.normal(0.0, step, (AROUND, len(best))) for step in STEPS]
    return [tuple(map(float, point)) for point in np.clip(np.vstack([everywhere, *around]), 0.0, 1.0)]


def _features(spaces: Sequence[Space], point: Sequence[float]) -> list[float]:
    """Return where a point lies for the process: a number for an ordered axis, one for each option of another."""
    found: list[float] = []
    for space, u in zip(spaces, point, strict=True):
        options = space.options()
        if options is None:
            found.append(u)
            continue
        position = options.index(space.value(u))
        if space.ordered:
            found.append(position / max(1, len(options) - 1))
        else:
            found += [float(position == other) for other in range(len(options))]
    return found


def _comparable(losses: Sequence[float], floor: float) -> list[float]:
    """Return the losses on a scale on which small differences near the best count, with mean 0 and deviation 1."""
    import numpy as np

    finite = sorted(loss for loss in losses if math.isfinite(loss))
    if not finite or finite[0] == max(losses):
        return [0.0] * len(losses)
    middle = finite[len(finite) // 2] - finite[0] or finite[-1] - finite[0] or 1.0
    excess = [min((loss - finite[0]) / middle, CUT) for loss in losses]
    found = np.log(floor + np.array(excess))
    return [float(value) for value in (found - found.mean()) / found.std()]


def _process(axes: int) -> Any:
    """Return a process over so many axes that has seen nothing. Raises MissingExtra without scikit-learn."""
    try:
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
    except ImportError:
        raise MissingExtra("a search by gp", "scikit-learn", "lab") from None
    matern = Matern([0.3] * axes, LENGTHS, nu=2.5)
    kernel = ConstantKernel(1.0, (0.05, 20.0)) * matern + WhiteKernel(1e-3, (1e-6, 0.1))
    return GaussianProcessRegressor(kernel, n_restarts_optimizer=1, random_state=0)


def _fitted(process: Any, known: Any, found: Any) -> Any:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of a length at its bound
        return process.fit(known, found)


@hookimpl
def metaopt_tuners() -> dict[str, type[Tuner]]:
    return {"gp": GP}
