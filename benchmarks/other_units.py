"""`python -m benchmarks.other_units`: false verdicts between an optimizer and itself in another unit of its rate.

SGD with momentum is compared with itself, both with their rate multiplied by a constant that the tuning does not know:
drawn log-uniformly from one cell of the default range, for each pair anew. Each pair is a whole comparison with the
default placement, seeds of its own, and the verdict of `metaopt compare`. The runs of many studies are trained side by
side, as one model with another dimension; `tests/benchmarks/test_other_units.py` holds them against `run_trial`.
Finished pairs are kept in a file: the same command goes on from there.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.func import functional_call, grad, stack_module_state, vmap

from metaopt.lab.comparison import edge_of
from metaopt.lab.holding import write_text
from metaopt.lab.named import problem_named
from metaopt.lab.placement import placed
from metaopt.lab.plan import HIGHEST, LOWEST, STUDIES, TRIALS
from metaopt.lab.statistics import LEVEL, verdicts
from metaopt.lab.trial import has_diverged
from metaopt.problem_class import Problem

MOMENTUM = 0.9


class SideBySide:
    """One network of a problem many times: each with its own seed and rate, trained by SGD with momentum."""

    def __init__(self, problem: Problem, seeds: Sequence[int], rates: Sequence[float]) -> None:
        self.problem = problem
        self._models = [problem.model(seed).eval() for seed in seeds]
        parameters, _ = stack_module_state(self._models)
        self.parameters = {name: p.detach() for name, p in parameters.items()}
        self._velocity = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self._rates = torch.tensor(rates, dtype=torch.float32)
        distinct = dict.fromkeys(seeds)
        self._batches = {seed: problem.batches(seed) for seed in distinct}
        self._batch_of = torch.tensor([list(distinct).index(seed) for seed in seeds])
        self._gradients = vmap(grad(self._loss))

    def _loss(self, parameters: dict[str, torch.Tensor], *batch: torch.Tensor) -> torch.Tensor:
        def model(x: torch.Tensor) -> Any:
            return functional_call(self._models[0], parameters, (x,))

        return self.problem.loss(model, batch)  # type: ignore[arg-type]

    def update(self) -> None:
        """Make one update of all: v <- momentum v + g, p <- p - lr v."""
        drawn = [next(batches) for batches in self._batches.values()]
        batch = [torch.stack(tensors)[self._batch_of] for tensors in zip(*drawn, strict=True)]
        for name, gradient in self._gradients(self.parameters, *batch).items():
            velocity = self._velocity[name].mul_(MOMENTUM).add_(gradient)
            rates = self._rates.view(-1, *[1] * (velocity.dim() - 1))
            self.parameters[name] = self.parameters[name] - rates * velocity

    @torch.no_grad()
    def losses(self, split: str) -> list[float]:
        """Return the loss of each on validation or test data."""
        found = []
        for number, model in enumerate(self._models):
            model.load_state_dict({name: p[number] for name, p in self.parameters.items()})
            found.append(self.problem.evaluate(model, split)["loss"])
        return found


def compare_pairs(problem: Problem, first: int, count: int, steps: int, studies: int = STUDIES) -> list[dict[str, Any]]:
    """Return, for so many pairs, both contenders' losses on test data and their best rates, study by study."""
    cell, span = (HIGHEST / LOWEST) ** (1 / TRIALS), math.log(HIGHEST / LOWEST)
    numbers = range(first, first + count)
    units = [cell ** np.random.default_rng([pair, 1]).uniform(-0.5, 0.5, 2) for pair in numbers]
    seeds, rates, trained = [], [], []
    for pair, factors in zip(numbers, units, strict=True):
        for study in range(studies):
            for contender, factor in enumerate(factors):
                for (x,) in placed(f"pair {pair} contender {contender} study {study}", TRIALS):
                    rates.append(float(f"{LOWEST * math.exp(span * x):.3g}"))
                    trained.append(rates[-1] * float(factor))
                    seeds.append(1000 * pair + study)
    running = SideBySide(problem, seeds, trained)
    initial = running.losses("validation")
    for _ in range(steps):
        running.update()
    ends = running.losses("validation")
    validation = [math.inf if has_diverged(end, first) else end for end, first in zip(ends, initial, strict=True)]
    shape = (count, studies, 2, TRIALS)
    best = np.array(validation).reshape(shape).argmin(axis=3, keepdims=True)
    test = np.where(np.isfinite(validation), running.losses("test"), np.inf).reshape(shape)
    chosen = [np.take_along_axis(table, best, 3)[..., 0] for table in (test, np.array(rates).reshape(shape))]
    return [
        {"units": list(map(float, factors)), "losses": losses.T.tolist(), "rates": kept.T.tolist()}
        for factors, losses, kept in zip(units, *chosen, strict=True)
    ]


def verdict_of(pair: dict[str, Any]) -> tuple[str, bool]:
    """Return the word on the second contender, and whether the beaten one's range is told to be too small."""
    word = next(v.word for v in verdicts(pair["losses"], level=LEVEL) if v is not None)
    beaten = pair["rates"][0 if word == "better" else 1]
    return word, word != "no difference shown" and edge_of(beaten, LOWEST, HIGHEST) is not None


def main() -> None:
    """Make the pairs that are missing, then count."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.other_units", description=__doc__)
    parser.add_argument("--problem", default="xor")
    parser.add_argument("--steps", type=int, help="updates of each run; the problem's own by default")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--studies", type=int, default=STUDIES)
    parser.add_argument("--together", type=int, default=10, help="pairs that are trained side by side")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long; what is done is kept")
    parser.add_argument("--out", type=Path, default=Path("runs/other_units"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    problem = problem_named(options.problem)
    steps = options.steps or problem.default_steps
    file = options.out / f"{options.problem}-{steps}-{options.studies}.json"
    done: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    began = time.monotonic()
    while len(done) < options.pairs and time.monotonic() - began < options.seconds:
        count = min(options.together, options.pairs - len(done))
        done += compare_pairs(problem, len(done), count, steps, options.studies)
        write_text(file, json.dumps(done))
    found = [verdict_of(pair) for pair in done[: options.pairs]]
    words = sum(word != "no difference shown" for word, _ in found)
    told = sum(edge for _, edge in found)
    print(
        f"{options.problem}: {len(found)} pairs of {options.studies} studies of {TRIALS} trials of {steps} updates: "
        f"{words - told} false verdicts ({(words - told) / len(found):.1%}), and {told} on a range that "
        "the report calls "
        f"too small; {time.monotonic() - began:.0f} s for what was missing"
    )


if __name__ == "__main__":
    main()
