"""`python -m benchmarks.other_units`: false verdicts between an optimizer and itself in another unit of its rate.

SGD with momentum is compared with itself, each time with both rates multiplied by constants that the tuning does not
know: drawn log-uniformly between 1/10 and 10, for each pair anew. Each pair is a whole comparison with the plan, the
moving rates and the verdicts of `metaopt compare`, and studies of its own. The runs of many studies are trained side by
side, as one model with another dimension; `tests/benchmarks/test_other_units.py` holds them against `run_trial`.
Finished pairs are kept in a file: the same command goes on from there.
"""

import argparse
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.func import functional_call, grad, stack_module_state, vmap

from metaopt.lab.holding import write_text
from metaopt.lab.moving import Moving
from metaopt.lab.named import problem_named
from metaopt.lab.plan import STUDIES, TRIALS, Plan, plan_comparison
from metaopt.lab.rates import rate_of
from metaopt.lab.statistics import verdicts
from metaopt.lab.trial import Trial, has_diverged
from metaopt.problem_class import Problem

MOMENTUM = 0.9
# one optimizer, written in two ways: `compare` takes no contender twice
SPECS = (f"sgd(momentum={MOMENTUM})", f"sgd(momentum={MOMENTUM}, dampening=0.0)")
# a unit is at most so many times larger or smaller than the one of the default range
FACTOR = 10.0
# numbers of studies, and so seeds and placements, of one pair and of the next
APART = 1000
TOGETHER = 1000


class SideBySide:
    """One network of a problem many times: each with its own seed, rate and momentum, trained by SGD."""

    def __init__(
        self, problem: Problem, seeds: Sequence[int], rates: Sequence[float], momenta: Sequence[float] | None = None
    ) -> None:
        self.problem = problem
        distinct = list(dict.fromkeys(seeds))
        made = [problem.model(seed).eval() for seed in distinct]
        self._model, self._batch_of = made[0], torch.tensor([distinct.index(seed) for seed in seeds])
        parameters, _ = stack_module_state(made)
        self.parameters = {name: p.detach()[self._batch_of] for name, p in parameters.items()}
        self._velocity = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self._rates = torch.tensor(rates, dtype=torch.float32)
        self._momenta = torch.tensor(momenta or [MOMENTUM] * len(rates), dtype=torch.float32)
        self._batches = [problem.batches(seed) for seed in distinct]
        self._gradients = vmap(grad(self._loss))

    def _loss(self, parameters: dict[str, torch.Tensor], *batch: torch.Tensor) -> torch.Tensor:
        def model(x: torch.Tensor) -> Any:
            return functional_call(self._model, parameters, (x,))

        model.parameters = lambda: iter(parameters.values())  # type: ignore[attr-defined]
        return self.problem.loss(model, batch[0] if self._bare else batch)  # type: ignore[arg-type]

    def update(self) -> None:
        """Make one update of all: v <- momentum v + g, p <- p - lr v."""
        drawn = [next(batches) for batches in self._batches]
        self._bare = isinstance(drawn[0], torch.Tensor)
        batch = [torch.stack(tensors)[self._batch_of] for tensors in zip(*map(_several, drawn), strict=True)]
        for name, gradient in self._gradients(self.parameters, *batch).items():
            rates, momenta = (each.view(-1, *[1] * (gradient.dim() - 1)) for each in (self._rates, self._momenta))
            velocity = self._velocity[name].mul_(momenta).add_(gradient)
            self.parameters[name] = self.parameters[name] - rates * velocity

    @torch.no_grad()
    def losses(self, split: str) -> list[float]:
        """Return the loss of each on validation or test data."""
        found, model = [], self._model
        for number in range(len(self._rates)):
            model.load_state_dict({name: p[number] for name, p in self.parameters.items()})
            found.append(self.problem.evaluate(model, split)["loss"])
        return found


def _several(batch: Any) -> Sequence[torch.Tensor]:
    return (batch,) if isinstance(batch, torch.Tensor) else batch


def planned(problem: str, steps: int, studies: int) -> Plan:
    """Return the plan of a pair: all of `metaopt compare` but its training."""
    return plan_comparison(problem=problem, specs=SPECS, steps=steps, studies=studies, out=Path("nowhere"))


def compare_pairs(plan: Plan, first: int, count: int, factor: float = FACTOR) -> list[dict[str, Any]]:
    """Return, for so many pairs, both contenders' losses on test data and how many trials each took."""
    units = {pair: _units(pair, factor) for pair in range(first, first + count)}
    made = {
        (pair, position): [Moving(plan, position, APART * pair + study) for study in range(plan.studies)]
        for pair in units
        for position in (0, 1)
    }
    trained: dict[tuple[Trial, float], tuple[float, float]] = {}
    pending = [(study, units[pair][position]) for (pair, position), row in made.items() for study in row]
    while pending:
        asked = [(trial, unit) for study, unit in pending for trial in study.trials.values()]
        missing = [each for each in asked if each not in trained]
        for start in range(0, len(missing), TOGETHER):
            some = missing[start : start + TOGETHER]
            trained.update(zip(some, _trained(plan, some), strict=True))
        pending = [
            (study, unit)
            for study, unit in pending
            if study.moves_on({trial: trained[trial, unit][0] for trial in study.trials.values()})
        ]
    found = []
    for pair, both in units.items():
        losses = [[_result(study, unit, trained) for study in made[pair, p]] for p, unit in enumerate(both)]
        trials = [sum(len(study.trials) for study in made[pair, p]) for p in (0, 1)]
        found.append({"units": both, "losses": losses, "trials": trials})
    return found


def _units(pair: int, factor: float) -> list[float]:
    return [float(factor**x) for x in np.random.default_rng([pair, 1]).uniform(-1.0, 1.0, 2)]


def _trained(plan: Plan, trials: Sequence[tuple[Trial, float]]) -> list[tuple[float, float]]:
    """Return the loss of each on validation and on test data, infinite where it diverged."""
    problem, seeds = problem_named(plan.problem), [trial.seed for trial, _ in trials]
    running = SideBySide(problem, seeds, [unit * rate_of(trial.spec, trial.updates) for trial, unit in trials])
    initial = {seed: problem.evaluate(problem.model(seed), "validation")["loss"] for seed in dict.fromkeys(seeds)}
    for _ in range(plan.updates[0]):
        running.update()
    ends = zip(running.losses("validation"), running.losses("test"), seeds, strict=True)
    return [(math.inf, math.inf) if has_diverged(v, initial[seed]) else (v, t) for v, t, seed in ends]


def _result(study: Moving, unit: float, trained: dict[tuple[Trial, float], tuple[float, float]]) -> float:
    """Return the loss on test data of the trial that is best on validation data."""
    return min((trained[trial, unit] for trial in study.trials.values()), key=lambda losses: losses[0])[1]


def word_on(pair: dict[str, Any]) -> str:
    """Return the verdict on the second contender."""
    return next(found.word for found in verdicts(pair["losses"]) if found is not None)


def main() -> None:
    """Make the pairs that are missing, then count."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.other_units", description=__doc__)
    parser.add_argument("--problem", default="xor")
    parser.add_argument("--steps", type=int, help="updates of each run; the problem's own by default")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--studies", type=int, default=STUDIES)
    parser.add_argument("--factor", type=float, default=FACTOR, help="how far a unit is from the range's, at most")
    parser.add_argument("--no-moves", action="store_true", help="hold the rates within the default range")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long; what is done is kept")
    parser.add_argument("--out", type=Path, default=Path("runs/other_units"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps = options.steps or problem_named(options.problem).default_steps
    plan = planned(options.problem, steps, options.studies)
    if options.no_moves:
        plan = replace(plan, given=(True, True))
    kept = f"{options.problem} {steps} {options.studies} {options.factor:g} {'held' if options.no_moves else 'moving'}"
    file = options.out / f"{re.sub('[^a-z0-9.]+', '-', kept)}.json"
    done: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    began = time.monotonic()
    while len(done) < options.pairs and time.monotonic() - began < options.seconds:
        done += compare_pairs(plan, len(done), min(5, options.pairs - len(done)), options.factor)
        write_text(file, json.dumps(done))
    done = done[: options.pairs]
    false = sum(word_on(pair) != "no difference shown" for pair in done)
    each = sum(sum(pair["trials"]) for pair in done) / (2 * len(done) * options.studies)
    print(
        f"{options.problem}: {len(done)} pairs of {options.studies} studies of {TRIALS} trials ({each:.1f} with those "
        f"beyond the range) of {steps} updates: {false} false verdicts ({false / len(done):.1%}); "
        f"{time.monotonic() - began:.0f} s for what was missing"
    )


if __name__ == "__main__":
    main()
