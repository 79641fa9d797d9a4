"""Interleaved timing: in every round each contender is measured once, and ratios are taken inside a round."""

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from metaopt.lab.bench.bandwidth import Probe
from metaopt.lab.bench.by_hand import Update
from metaopt.lab.bench.clock import Sample, sample
from metaopt.lab.bench.shapes import Named, TensorSet

# a sample has at least so many updates: one that is interrupted must not weigh too much where an update is short
FEWEST = 5
FEWEST_SMALL = 50
SMALL = 1 << 20  # bytes of parameters


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles; of one value, that value three times."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high)


@dataclass
class Runner:
    """One contender at work: its update, its own parameters, how many updates a whole cycle of it takes."""

    key: str
    update: Update
    parameters: Named
    cycle: int
    per_sample: int = 0
    samples: list[Sample] = field(default_factory=list)

    def seconds(self) -> list[float]:
        """Return the seconds of one update, round by round."""
        return [s.device for s in self.samples]


def interleave(
    tensors: TensorSet,
    runners: Sequence[Runner],
    rounds: int,
    probe: Probe | None = None,
    progress: Callable[[], None] | None = None,
    seed: int = 0,
) -> list[float]:
    """Measure every runner in every round, in an order that changes; return the bandwidth of each round."""
    device = tensors.weights[0].device
    for runner in runners:
        _warm_up(tensors, runner, device)
    order, shuffled, bandwidths = list(runners), random.Random(seed), []
    for _ in range(rounds):
        if probe is not None:
            bandwidths.append(probe.measure())
        # who comes after whom changes, so that no one always inherits the same caches
        shuffled.shuffle(order)
        for runner in order:
            runner.samples.append(_measured(tensors, runner, device, runner.per_sample))
        if progress is not None:
            progress()
    return bandwidths


def ratios(runner: Runner, baseline: Runner) -> Spread:
    """Return the ratio of times, taken in each round, with its quartiles over the rounds."""
    return spread([a / b for a, b in zip(runner.seconds(), baseline.seconds(), strict=True)])


def _warm_up(tensors: TensorSet, runner: Runner, device: torch.device) -> None:
    """Make the state, and choose the length of a sample: whole cycles, so that what is due every k updates counts."""
    fewest = FEWEST_SMALL if tensors.bytes < SMALL and len(tensors.weights) < FEWEST_SMALL else FEWEST
    runner.per_sample = runner.cycle * math.ceil(fewest / runner.cycle)
    _measured(tensors, runner, device, runner.cycle)


def _measured(tensors: TensorSet, runner: Runner, device: torch.device, updates: int) -> Sample:
    return sample(device, lambda: tensors.restore(runner.parameters), runner.update.step, updates)
