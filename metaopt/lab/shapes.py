"""The tensors that updates are measured on: sets of shapes, and gradients that are the same at every update."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from metaopt.errors import ProblemError, did_you_mean

NamedParameters = list[tuple[str, nn.Parameter]]
NamedShapes = Iterator[tuple[str, tuple[int, ...]]]

# the transformer: 148 tensors, 25 million elements with a tied output
WIDTH, LAYERS, CONTEXT, VOCABULARY = 416, 12, 64, 128
WEIGHT_SCALE = 0.02
# far above any usual clipping threshold, so that clipping really scales
GRADIENT_NORM = 10.0


def _tiny() -> NamedShapes:
    for position, (inputs, outputs) in enumerate(pairwise((64, 128, 128, 10))):
        yield f"layers.{position}.weight", (outputs, inputs)
        yield f"layers.{position}.bias", (outputs,)


def _transformer() -> NamedShapes:
    yield "token.weight", (VOCABULARY, WIDTH)
    yield "position.weight", (CONTEXT, WIDTH)
    linear = {"self_attn.in_proj_": (3, 1), "self_attn.out_proj.": (1, 1), "linear1.": (4, 1), "linear2.": (1, 4)}
    for layer in range(LAYERS):
        for name, (outputs, inputs) in linear.items():
            yield f"blocks.layers.{layer}.{name}weight", (outputs * WIDTH, inputs * WIDTH)
            yield f"blocks.layers.{layer}.{name}bias", (outputs * WIDTH,)
        for name in ("norm1", "norm2"):
            yield f"blocks.layers.{layer}.{name}.weight", (WIDTH,)
            yield f"blocks.layers.{layer}.{name}.bias", (WIDTH,)
    yield "norm.weight", (WIDTH,)
    yield "norm.bias", (WIDTH,)


def _large() -> NamedShapes:
    return ((f"matrices.{i}.weight", (4096, 1024)) for i in range(12))


def _many() -> NamedShapes:
    return ((f"norms.{i // 2}.{('weight', 'bias')[i % 2]}", (16,)) for i in range(1000))


_SHAPES: dict[str, Callable[[], NamedShapes]] = {
    "tiny": _tiny,
    "transformer": _transformer,
    "large": _large,
    "many": _many,
}
SETS = {
    "tiny": "a perceptron of 6 tensors",
    "transformer": "a transformer of 148 tensors, 25 million elements",
    "large": "twelve 4096x1024 matrices",
    "many": "1,000 tensors of 16 elements",
}
DEFAULT_SETS = ("tiny", "transformer", "large")


def shapes_of(name: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return the names and shapes of a set. Raises ProblemError for a set that does not exist."""
    if name not in _SHAPES:
        raise ProblemError(f"unknown shapes {name!r}.{did_you_mean(name, SETS)} Choose from: {', '.join(SETS)}")
    return list(_SHAPES[name]())


@dataclass(frozen=True)
class TensorSet:
    """One set of shapes on one device: every update works on its own copy of `weights` with the same gradients.

    The gradients are put back before each update, outside the time that is measured. Otherwise clipping would scale
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

    def parameters(self) -> NamedParameters:
        """Return new parameters that begin at `weights`."""
        return [(name, nn.Parameter(w.clone())) for name, w in zip(self.names, self.weights, strict=True)]

    @torch.no_grad()
    def restore(self, parameters: NamedParameters) -> None:
        """Give the parameters their gradients, whatever the last update made of them."""
        for (_, p), gradient in zip(parameters, self.handed_out, strict=True):
            p.grad = gradient
        torch._foreach_copy_(self.handed_out, self.gradients)


def make_tensor_set(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> TensorSet:
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
