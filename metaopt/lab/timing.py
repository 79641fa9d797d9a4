"""Time the update of stacks beside that of their bare bases: interleaved, so that a busy machine slows all alike."""

import inspect
import math
import random
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import timer

from metaopt.construction.building import build
from metaopt.errors import SpecError, StepError
from metaopt.lab.shapes import TensorSet, make_tensor_set
from metaopt.specs.pipeline import as_pipeline
from metaopt.stack import Stack

Key = TypeVar("Key", bound=Hashable)
Measured = TypeVar("Measured")

# a sample has at least so many updates: one that is interrupted must not weigh too much if an update is short
MIN_UPDATES, MIN_SMALL_UPDATES = 12, 60
SMALL_SAMPLE_BYTES = 1 << 20
# parameters of fewer bytes than this are made again so many times
SMALL_BYTES, REBUILDS = 1 << 24, 4
# the end of schedules that run to the end of training
TOTAL_STEPS = 10_000


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


def ratios(seconds: Sequence[float], baseline: Sequence[float]) -> Spread:
    """Return the ratio of times, taken in each round, with its quartiles over the rounds."""
    return spread([a / b for a, b in zip(seconds, baseline, strict=True)])


def time_interleaved(
    make: Mapping[Key, Callable[[], Callable[[], Measured]]],
    rounds: int,
    rebuilds: int = 1,
    before_round: Callable[[], Any] | None = None,
) -> dict[Key, list[Measured]]:
    """Call every measurement once in every round, in an order that changes; return the results by key.

    `make` gives a function that makes each measurement, with parameters of its own. All are made again `rebuilds`
    times on the way: the addresses that the allocator happens to give small tensors change the time of one and the
    same update by more than the updates differ.
    """
    results: dict[Key, list[Measured]] = {key: [] for key in make}
    rebuilds = min(rebuilds, rounds)
    for rebuild in range(rebuilds):
        measure = {key: make_one() for key, make_one in make.items()}
        # if one always ran behind the same other, it would always inherit the same caches
        order, shuffled = list(measure), random.Random(rebuild)
        for _ in range(rounds * (rebuild + 1) // rebuilds - rounds * rebuild // rebuilds):
            if before_round is not None:
                before_round()
            shuffled.shuffle(order)
            for key in order:
                results[key].append(measure[key]())
    return results


def count_rebuilds(tensors: TensorSet) -> int:
    """Return how often `time_interleaved` makes parameters of these sizes."""
    return REBUILDS if tensors.bytes < SMALL_BYTES else 1


def count_updates(tensors: TensorSet, cycle: int) -> int:
    """Return how many updates a sample has: whole cycles, so that what happens every k updates always counts."""
    small = tensors.bytes < SMALL_SAMPLE_BYTES and len(tensors.weights) < MIN_SMALL_UPDATES
    return cycle * math.ceil((MIN_SMALL_UPDATES if small else MIN_UPDATES) / cycle)


def mean_seconds(restore: Callable[[], Any], step: Callable[[], Any], updates: int) -> float:
    """Return the mean seconds of `step`, with `restore` called ahead of each and left out of the time."""
    total = 0.0
    for _ in range(updates):
        restore()
        began = timer()  # waits for the device
        step()
        total += timer() - began
    return total / updates


def steps_of_update(stack: Stack) -> int:
    """Return how many steps make one update, which is more than one where gradients are accumulated."""
    group = stack.param_groups[0]
    return math.prod(int(group[f"{w.label}.{w.spans_steps}"]) for w in stack.wrappers if w.spans_steps is not None)


def cycle_of(stack: Stack) -> int:
    """Return after how many steps everything that happens every k updates has happened equally often."""
    group = stack.param_groups[0]
    periods = (int(group[f"{w.label}.{w.acts_every}"]) for w in stack.wrappers if w.acts_every is not None)
    return math.lcm(*periods) * steps_of_update(stack)


class Runner:
    """One update with parameters of its own: that of a stack, or with `bare` that of its base without wrappers.

    Wrappers that evaluate the loss get one that costs nothing. Raises SpecError for a base that evaluates it itself.
    """

    def __init__(self, spec: str, tensors: TensorSet, *, bare: bool = False) -> None:
        self.tensors, self.parameters = tensors, tensors.parameters()
        self.stack = build(self.parameters, spec, total_steps=TOTAL_STEPS)
        # the stack never steps: its base is what the same settings build without it
        self.optimizer: torch.optim.Optimizer = self.stack.base if bare else self.stack
        closure = inspect.signature(type(self.stack.base).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise SpecError(
                f"{spec}: its base evaluates the loss itself, so its update cannot be timed without a model"
            )
        tensors.restore(self.parameters)
        # of the class: the stack would warn of a step of its base that it does not see
        self.step: Callable[..., Any] = partial(type(self.optimizer).step, self.optimizer)
        try:
            self.step()
        except StepError:  # a wrapper that wants a closure
            self.step = partial(self.step, self._evaluate)
            self.step()

    def _evaluate(self) -> torch.Tensor:
        for (_, p), gradient in zip(self.parameters, self.tensors.handed_out, strict=True):
            p.grad = gradient
        return self.tensors.handed_out[0].new_zeros(())

    def measure(self, updates: int) -> float:
        """Return the mean seconds of so many updates."""
        return mean_seconds(lambda: self.tensors.restore(self.parameters), self.step, updates)

    def state_bytes(self) -> int:
        """Return the bytes of the tensors in the state, memory that several of them share counted once."""
        tensors = [t for state in self.optimizer.state.values() for t in tree_leaves(state)]
        storages = [t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@dataclass(frozen=True)
class Row:
    """What was measured of one spec over one set of tensors; times are seconds per update."""

    spec: str
    base: str
    seconds: Spread
    base_seconds: Spread
    ratio: Spread
    updates_per_round: int
    state_bytes: int
    base_state_bytes: int


@dataclass(frozen=True)
class ShapeResult:
    """The rows of one set of tensors, with what holds for all of them."""

    name: str
    tensors: int
    elements: int
    parameter_bytes: int
    rounds: int
    rows: list[Row]


def check_specs(specs: Sequence[str]) -> None:
    """Raise MetaoptError for a spec that cannot be built or timed."""
    for spec in specs:
        Runner(spec, make_tensor_set("tiny"))


def time_specs(
    specs: Sequence[str], tensors: TensorSet, rounds: int, before_round: Callable[[], Any] | None = None
) -> ShapeResult:
    """Time the update of each spec and that of its bare base in the same rounds. Raises MetaoptError."""
    bases = {spec: _base_of(spec) for spec in specs}
    updates = {spec: count_updates(tensors, cycle_of(Runner(spec, tensors).stack)) for spec in bases}
    runners: dict[tuple[str, str], Runner] = {}

    def make(key: tuple[str, str], spec: str) -> Callable[[], float]:
        runner = runners[key] = Runner(spec, tensors, bare=key[0] == "base")
        runner.measure(updates[spec])  # makes the state
        return partial(runner.measure, updates[spec])

    # specs that have the same base share its measurement
    keys = {("base", base): spec for spec, base in bases.items()} | {("spec", spec): spec for spec in bases}
    makers = {key: partial(make, key, spec) for key, spec in keys.items()}
    seconds = time_interleaved(makers, rounds, count_rebuilds(tensors), before_round)
    rows = []
    for spec, base in bases.items():
        own, bare = ("spec", spec), ("base", base)
        rows.append(
            Row(
                spec=spec,
                base=base,
                seconds=spread(seconds[own]),
                base_seconds=spread(seconds[bare]),
                ratio=ratios(seconds[own], seconds[bare]),
                updates_per_round=updates[spec],
                state_bytes=runners[own].state_bytes(),
                base_state_bytes=runners[bare].state_bytes(),
            )
        )
    return ShapeResult(tensors.name, len(tensors.names), tensors.elements, tensors.bytes, rounds, rows)


def _base_of(spec: str) -> str:
    return " | ".join(str(part) for part in as_pipeline(spec) if part.kind == "optimizer")
