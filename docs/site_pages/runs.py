"""Short runs on one small problem: what is drawn and counted on the page of a part comes from them."""

import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

import metaopt
from benchmarks.traffic import Traffic

WIDTH = 16
UPDATES = 120
# every so many batches one has targets that are far off: what clips is there for that
SPIKES = 25
TRUTH = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(7))
SIZES = torch.logspace(-1, 0, WIDTH)


@dataclass(frozen=True)
class Regression:
    """A linear layer learns a linear map from noisy batches whose inputs differ ten times in size."""

    sparse: bool = False
    bias: bool = True
    spikes: bool = False

    def model(self) -> torch.nn.Module:
        """Return the layer with its initial weights, which are near zero."""
        if self.sparse:
            layer: Any = torch.nn.Embedding(WIDTH, WIDTH, sparse=True)
        else:
            layer = torch.nn.Linear(WIDTH, WIDTH, bias=self.bias)
        with torch.no_grad():
            for number, p in enumerate(layer.parameters()):
                p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
        return layer

    def batches(self, size: int = 8) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield inputs and noisy targets without end."""
        generator = torch.Generator().manual_seed(1)
        for number in itertools.count(1):
            inputs = self._inputs(size, generator)
            targets = self._map(inputs) + 0.3 * torch.randn(size, WIDTH, generator=generator)
            if self.spikes and number % SPIKES == 0:
                targets = targets + 30.0
            yield inputs, targets

    def excess(self, model: torch.nn.Module) -> float:
        """Return the mean squared distance from the true map, over inputs that are never trained on."""
        inputs = self._inputs(256, torch.Generator().manual_seed(2))
        with torch.no_grad():
            return float((model(inputs) - self._map(inputs)).square().mean())

    def _inputs(self, size: int, generator: torch.Generator) -> torch.Tensor:
        if self.sparse:
            return torch.randint(WIDTH, (size,), generator=generator)
        return torch.randn(size, WIDTH, generator=generator) * SIZES

    def _map(self, inputs: torch.Tensor) -> torch.Tensor:
        return TRUTH[inputs] if self.sparse else inputs @ TRUTH


@dataclass
class Run:
    """What a run gave: the error after each update, also on each average, and what the stack is at its end."""

    losses: list[tuple[float, float]]
    averages: dict[str, list[tuple[float, float]]]
    stack: Any
    model: torch.nn.Module
    evaluations: float  # of the loss, for an update


@cache  # many wrappers are drawn around one base
def train(problem: Regression, spec: str, updates: int = UPDATES, every: int = 4) -> Run:
    """Train the problem with a stack from its initial weights."""
    torch.manual_seed(0)
    model = problem.model()
    stack = metaopt.build(list(model.named_parameters()), spec, total_steps=updates)
    losses, averages = [(0.0, problem.excess(model))], defaultdict(list)
    evaluations = steps = 0
    for inputs, targets in problem.batches():

        def closure(inputs: torch.Tensor = inputs, targets: torch.Tensor = targets) -> torch.Tensor:
            nonlocal evaluations
            evaluations += 1
            stack.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        before, steps = stack.updates, steps + 1
        stack.step(closure)
        if stack.updates >= updates or steps >= 8 * updates:
            break
        if stack.updates != before and stack.updates % every == 0:
            losses.append((stack.updates, problem.excess(model)))
            for label in _averages(stack):
                with stack.averaged(label):
                    averages[label].append((stack.updates, problem.excess(model)))
    return Run(losses, dict(averages), stack, model, evaluations / max(1, stack.updates))


def _averages(stack: Any) -> list[str]:
    return [wrapper.label for wrapper in stack.wrappers if "averaged" in wrapper.implemented_hooks()]


def state_of(run: Run) -> dict[str, float]:
    """Return the elements of each state entry of the largest parameter, as multiples of its own."""
    largest = max(run.model.parameters(), key=torch.Tensor.numel)
    held = run.stack.state.get(largest, {})
    return {
        key: (value.numel() / largest.numel() if isinstance(value, torch.Tensor) else math.nan)
        for key, value in held.items()
    }


@cache
def traffic_of(problem: Regression, spec: str, updates: int = 20) -> float:
    """Return the bytes that an update must read and write at least, as multiples of the parameters' bytes."""
    model = problem.model()
    stack = metaopt.build(list(model.named_parameters()), spec, total_steps=1000)
    batches = problem.batches()

    def evaluate() -> torch.Tensor:
        stack.zero_grad()
        inputs, targets = next(batches)
        loss = (model(inputs) - targets).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    stack.step(evaluate)  # the first update makes the state
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    moved = Traffic(stack).watch(stack.step, evaluate, updates)
    return sum(moved.values()) / size


TRIALS = {
    "float64 parameters": {"dtype": torch.float64},
    "bfloat16 parameters": {"dtype": torch.bfloat16},
    "float16 parameters": {"dtype": torch.float16},
    "complex parameters": {"dtype": torch.complex64},
    "sparse gradients": {"sparse": True},
    "vectors and scalars": {"shapes": ((5,), ())},
    "a parameter without a gradient": {"without": True},
    "a copy of the stack (`deepcopy`)": {"copied": True},
    "no closure": {"closure": False},
}


def works_with(spec: str) -> dict[str, str]:
    """Return, for each thing that is tried, an empty text if three updates were made, otherwise the reason."""
    return {name: _tried(spec, **settings) for name, settings in TRIALS.items()}


def _tried(
    spec: str,
    *,
    dtype: torch.dtype = torch.float32,
    sparse: bool = False,
    shapes: tuple[tuple[int, ...], ...] = ((4, 3), (2, 2)),
    without: bool = False,
    copied: bool = False,
    closure: bool = True,
) -> str:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    try:
        stack = metaopt.build(params, spec, total_steps=100)
        if copied:
            # the copy has its own list of the same parameters
            stack = copy.deepcopy(stack)
            params = [p for group in stack.param_groups for p in group["params"]]

        def evaluate() -> torch.Tensor:
            for number, p in enumerate(params):
                gradient = torch.randn(p.shape, dtype=dtype)
                p.grad = None if without and number else gradient.to_sparse() if sparse else gradient
            return params[0].detach().abs().square().sum()

        for _ in range(3):
            evaluate()
            stack.step(evaluate) if closure else stack.step()
        if not all(p.detach().abs().isfinite().all() for p in params):
            return "the weights were not finite after three updates"
    except Exception as error:  # whatever it is, the page gives it as the reason
        return str(error).split("\n")[0] or type(error).__name__
    return ""
