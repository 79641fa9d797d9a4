"""`python -m benchmarks.other_units_table`: thousands of the pairs of `benchmarks.other_units`, drawn from one table.

The table holds the losses of SGD with momentum for many seeds at many rates, trained once. A pair draws ten of the
seeds, and for each contender a unit and a placement of its own for every study; a rate is the nearest one of the table.
Beyond the highest rate of the table a run counts as diverged. Of two equal losses chance decides which is less: between
rates that are no table's there are no equal ones.
"""

import argparse
import math
from typing import Any

import numpy as np
import torch

from benchmarks.other_units import FACTOR, SideBySide
from benchmarks.power import all_shown
from metaopt.lab.named import problem_named
from metaopt.lab.plan import HIGHEST, LOWEST, STUDIES, TRIALS
from metaopt.lab.statistics import LEVEL
from metaopt.lab.trial import has_diverged

RATES = np.geomspace(5e-4, 1.5, 52)
STEP = math.log(HIGHEST / LOWEST) / TRIALS
AT_ONCE = 10

Table = Any


def trained(problem: str, steps: int, seeds: int) -> tuple[Table, Table]:
    """Return the losses on validation and on test data, seeds x rates, infinite where a run diverged."""
    made, tables = problem_named(problem), []
    for first in range(0, seeds, AT_ONCE):
        some = range(first, min(first + AT_ONCE, seeds))
        running = SideBySide(
            made, [seed for seed in some for _ in RATES], [float(rate) for _ in some for rate in RATES]
        )
        initial = [made.evaluate(made.model(seed), "validation")["loss"] for seed in some for _ in RATES]
        for _ in range(steps):
            running.update()
        validation, test = running.losses("validation"), running.losses("test")
        lost = [has_diverged(loss, start) for loss, start in zip(validation, initial, strict=True)]
        both = [np.where(lost, np.inf, losses).reshape(len(some), -1) for losses in (validation, test)]
        tables.append(both)
    validation_table, test_table = (np.concatenate(parts) for parts in zip(*tables, strict=True))
    return validation_table, test_table


def studied(tables: tuple[Table, Table], seeds: Table, units: Table, random: Any, moves: int) -> tuple[Table, float]:
    """Return the result of each study, pairs x studies, and how many trials one took on average."""
    shift, places = random.random(seeds.shape), np.arange(-moves, TRIALS + moves)
    rates = math.log(LOWEST) + STEP * (places + shift[..., None]) + np.log(units)[:, None, None]
    nearest = np.rint((rates - math.log(RATES[0])) / math.log(RATES[1] / RATES[0])).astype(int)
    nearest = nearest.clip(0, len(RATES) - 1)
    validation, test = (table[seeds[..., None], nearest] for table in tables)
    validation = np.where(rates > math.log(RATES[-1]) + 0.1, np.inf, validation)
    first, last = np.full(seeds.shape, moves), np.full(seeds.shape, moves + TRIALS - 1)

    def at(index: Table) -> Table:
        return np.take_along_axis(validation, index.clip(0, len(places) - 1)[..., None], 2)[..., 0]

    while True:
        within = (np.arange(len(places)) >= first[..., None]) & (np.arange(len(places)) <= last[..., None])
        shown = np.where(within, validation, np.inf)
        best, lost, room = shown.argmin(axis=2), ~np.isfinite(shown).any(axis=2), last - first + 1 < TRIALS + moves
        down = ((best == first) & (at(first) < at(first + 1)) | lost) & room
        up = (best == last) & (at(last) < at(last - 1)) & ~lost & room
        if not (down | up).any():
            return np.take_along_axis(test, best[..., None], 2)[..., 0], float((last - first + 1).mean())
        first, last = first - down, last + up


def false_verdicts(tables: tuple[Table, Table], pairs: int, factor: float, moves: int) -> tuple[float, float]:
    """Return the share of pairs with a verdict, and how many trials a study took on average."""
    random = np.random.default_rng(0)
    seeds = np.array([random.choice(len(tables[0]), STUDIES, replace=False) for _ in range(pairs)])
    units = factor ** random.uniform(-1.0, 1.0, (2, pairs))
    found = [studied(tables, seeds, each, random, moves) for each in units]
    scores = np.stack([np.where(np.isfinite(losses), losses, 1e9) for losses, _ in found], axis=1)
    scores += random.normal(size=scores.shape) * 1e-9
    return float(all_shown(scores, LEVEL).any(axis=1).mean()), float(np.mean([trials for _, trials in found]))


def main() -> None:
    """Train the table and print a row of docs/guides/comparing.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.other_units_table", description=__doc__)
    parser.add_argument("--problem", default="xor")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=2500)
    parser.add_argument("--factor", type=float, default=FACTOR)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tables = trained(options.problem, options.steps, options.seeds)
    held, _ = false_verdicts(tables, options.pairs, options.factor, 0)
    moving, trials = false_verdicts(tables, options.pairs, options.factor, TRIALS)
    print(f"| `{options.problem}` | {options.steps} | {held:.1%} | {moving:.1%} | {trials:.1f} |")


if __name__ == "__main__":
    main()
