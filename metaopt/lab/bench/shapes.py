"""The tensors that updates are measured on: sets of shapes, and gradients that stay what they are."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from metaopt.errors import ProblemError, did_you_mean
from metaopt.problem import Problem
from metaopt.registry import registry

Named = list[tuple[str, nn.Parameter]]

# the text model of the problem `charlm`, as large as this: 148 tensors, 25 million elements with a tied output
WIDTH, LAYERS, CONTEXT, BATCH = 416, 12, 64, 8
MLP = (64, 128, 128, 10)
WEIGHT_SCALE = 0.02
# far above any usual clipping threshold, so that clipping really scales
GRADIENT_NORM = 10.0


def _mlp() -> Iterator[tuple[str, tuple[int, ...]]]:
    for position, (inputs, outputs) in enumerate(pairwise(MLP)):
        yield f"layers.{position}.weight", (outputs, inputs)
        yield f"layers.{position}.bias", (outputs,)


def text_problem() -> Problem:
    """Return the problem whose model has the transformer's shapes: real text, next character."""
    problem: Problem = registry.find("charlm", "problem").target(
        width=WIDTH, layers=LAYERS, context=CONTEXT, batch_size=BATCH
    )
    return problem


def text_model(device: torch.device | str = "cpu") -> nn.Module:
    """Return the transformer itself, its output tied to its embedding."""
    model: Any = text_problem().model(0, device)
    model.head.weight = model.token.weight
    model.head.register_parameter("bias", None)
    with torch.no_grad():
        model.token.weight.mul_(WEIGHT_SCALE)
    whole: nn.Module = model
    return whole


def shapes_of(name: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return a set's names and shapes. Raises ProblemError for a set that does not exist."""
    if name == "tiny":
        return list(_mlp())
    if name == "transformer":
        return [(name, tuple(p.shape)) for name, p in text_model().named_parameters()]
    if name == "large":
        return [(f"matrix.{i}", (4096, 1024)) for i in range(12)]
    if name == "many":
        return [(f"vector.{i}", (16,)) for i in range(1000)]
    raise ProblemError(f"no shape set is called {name!r}.{did_you_mean(name, SETS)} There is: {', '.join(SETS)}")


SETS = {
    "tiny": "an MLP of 6 tensors",
    "transformer": "a transformer of 148 tensors, 25 million elements",
    "large": "twelve 4096x1024 matrices",
    "many": "1,000 tensors of 16 elements",
}
DEFAULT_SETS = ("tiny", "transformer", "large")


@dataclass(frozen=True)
class TensorSet:
    """One set of shapes on one device: every contender updates its own copy of `weights` by the same gradients.

    The gradients are put back before each update, outside the time that is measured. Left alone, clipping would scale
    what it scaled before, and a wrapper that always shrinks them would take them to zero: to denormal numbers, on
    which a CPU is many times slower. They are the same at every update, because then no average of them decays to
    denormal numbers either. An update reads gradients that were just written, as it does after a backward pass.
    """

    name: str
    names: list[str]
    weights: list[torch.Tensor]
    gradients: list[torch.Tensor]
    handed_out: list[torch.Tensor]

    @property
    def elements(self) -> int:
        """How many elements the parameters have."""
        return sum(w.numel() for w in self.weights)

    @property
    def bytes(self) -> int:
        """How many bytes one copy of the parameters takes."""
        return sum(w.numel() * w.element_size() for w in self.weights)

    def parameters(self) -> Named:
        """Return new parameters that begin at `weights`."""
        return [(name, nn.Parameter(w.clone())) for name, w in zip(self.names, self.weights, strict=True)]

    @torch.no_grad()
    def restore(self, parameters: Named) -> None:
        """Give the parameters their gradients, whatever the last update made of them."""
        for (_, p), gradient in zip(parameters, self.handed_out, strict=True):
            p.grad = gradient
        torch._foreach_copy_(self.handed_out, self.gradients)


def tensor_set(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> TensorSet:
    """Make a set of tensors: weights and gradients normally distributed, the gradients of norm 10 altogether."""
    shapes = shapes_of(name)
    random = torch.Generator(device).manual_seed(0)
    count = sum(torch.Size(shape).numel() for _, shape in shapes)

    def normal(scale: float) -> list[torch.Tensor]:
        made = (torch.randn(shape, generator=random, device=device) for _, shape in shapes)
        return [(tensor.mul_(scale)).to(dtype) for tensor in made]

    gradients = normal(GRADIENT_NORM / count**0.5)
    return TensorSet(
        name, [n for n, _ in shapes], normal(WEIGHT_SCALE), gradients, [torch.empty_like(g) for g in gradients]
    )
