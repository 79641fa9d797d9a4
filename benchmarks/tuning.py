"""`python -m benchmarks.tuning`: how near 30 trials of `metaopt tune` come to a grid of 500, on several problems.

SGD with its rate and its momentum to choose. The grid has 25 rates and 20 values of momentum. The distance is the loss
on validation data of the setting that was found, less the least of the grid, as a share of what lies between that and
the default of SGD: negative where the search was better than the grid. It is the median over repeats, each a search
with another seed. All settings are trained, with the seed of `metaopt tune`, side by side as one model with another
dimension: nothing is interpolated.
"""

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.other_units import SideBySide
from metaopt.lab.named import problem_named
from metaopt.lab.search import points
from metaopt.lab.trial import has_diverged
from metaopt.lab.tuning import TRAINING_SEED, tuner_named
from metaopt.problem_class import Problem
from metaopt.space import Space
from metaopt.specs.parsing import parse
from metaopt.specs.spaces import spaces_of
from metaopt.tuner import Point, Task, Tried

SPEC = "sgd(lr=log(1e-4, 1), momentum=uniform(0, 0.99))"
DEFAULT = (1e-3, 0.0)
GRID = (25, 20)
PROBLEMS = {
    "noisy_quadratic": 100,
    "xor": 100,
    "digits(batch_size=16)": 40,
    "digits_autoencoder": 40,
    "factorisation": 100,
}


class Search(Task):
    """A search whose settings are trained side by side."""

    def __init__(self, problem: Problem, steps: int, trials: int, seed: int) -> None:
        self.problem, self.budget, self.trials, self.seed = problem, steps, trials, seed
        self.name, self.jobs, self.folder = f"{problem} {seed}", 1, Path("nowhere")
        self.spaces: Mapping[str, Space] = spaces_of(parse(SPEC))
        self.found: dict[Tried, float] = {}

    def points(self, count: int) -> list[Point]:
        return points(len(self.spaces), count, self.seed)

    def losses(self, tried: Sequence[Tried]) -> list[float]:
        settings = [tuple(map(float, self.values(each.point).values())) for each in tried]
        losses = trained(self.problem, self.budget, settings)
        self.found.update(zip(tried, losses, strict=True))
        return losses

    def loss(self, tried: Tried) -> float:
        return self.losses([tried])[0]


def trained(problem: Problem, steps: int, settings: Sequence[tuple[float, ...]]) -> list[float]:
    """Return the final loss on validation data of each rate and momentum, infinite where the run diverged."""
    rates, momenta = zip(*settings, strict=True)
    running = SideBySide(problem, [TRAINING_SEED] * len(rates), rates, momenta)
    initial = problem.evaluate(problem.model(TRAINING_SEED), "validation")["loss"]
    for _ in range(steps):
        running.update()
    return [math.inf if has_diverged(loss, initial) else loss for loss in running.losses("validation")]


def distances(name: str, steps: int, trials: int, repeats: int, method: str) -> tuple[float, float, list[float]]:
    """Return the loss of the default, the least of the grid, and by how much each search is off, as a share."""
    problem = problem_named(name)
    spaces = list(spaces_of(parse(SPEC)).values())
    axes = [[float(space.value(u)) for u in np.linspace(0, 1, n)] for space, n in zip(spaces, GRID, strict=True)]
    grid = [(rate, momentum) for rate in axes[0] for momentum in axes[1]]
    default, *losses = trained(problem, steps, [DEFAULT, *grid])
    best, found = min(losses), []
    for seed in range(repeats):
        search = Search(problem, steps, trials, seed)
        tried = tuner_named(method).run(search)
        found.append((min(search.found[each] for each in tried if each.share >= 1.0) - best) / (default - best))
    return default, best, found


def main() -> None:
    """Print a row for each problem."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description=__doc__)
    parser.add_argument("--problem", action="append", help=f"one of {', '.join(PROBLEMS)}; all by default")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--method", default="gp")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| problem | updates | default | best of grid | median distance | worst |\n|" + " --- |" * 6)
    for name in options.problem or PROBLEMS:
        began = time.monotonic()
        default, best, found = distances(name, PROBLEMS[name], options.trials, options.repeats, options.method)
        print(
            f"| `{name}` | {PROBLEMS[name]} | {default:.4g} | {best:.4g} | {median(found):+.1%} | {max(found):+.1%} | "
            f"({time.monotonic() - began:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
