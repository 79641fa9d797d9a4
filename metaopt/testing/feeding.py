"""The small models that parts are checked on, and the batches that they are fed: each a function of its number."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

STEPS = 6  # of a whole run: two syncs and more for a part that acts every 2 updates
MIDDLE = 3  # no multiple of 2: in the middle of a cycle of such a part
BATCH = 6


@dataclass(frozen=True)
class Batch:
    """What both halves of a model are shown at one step."""

    inputs: tuple[torch.Tensor, torch.Tensor]
    goals: tuple[torch.Tensor, torch.Tensor]


class Halves(nn.Module):
    """Two layers that share nothing: what happens to the parameters of one leaves the gradients of the other alone."""

    def __init__(self, *, bias: bool, sparse: bool) -> None:
        super().__init__()
        self.left: nn.Module = nn.Embedding(5, 4, sparse=True) if sparse else nn.Linear(3, 4, bias=bias)
        self.right: nn.Module = nn.Embedding(5, 2, sparse=True) if sparse else nn.Linear(4, 2, bias=bias)

    def groups(self) -> list[dict[str, Any]]:
        """Return each half as a parameter group, with names."""
        halves = {"left": self.left, "right": self.right}
        return [{"params": list(half.named_parameters(prefix=name))} for name, half in halves.items()]

    def loss(self, batch: Batch, halves: Sequence[int] = (0, 1)) -> torch.Tensor:
        """Return the squared error of some of the halves, with its graph."""
        layers = (self.left, self.right)
        errors = [layers[i](batch.inputs[i]) - batch.goals[i] for i in halves]
        # abs: a complex error has a real square as well
        return torch.stack([error.abs().square().mean() for error in errors]).sum()

    @torch.no_grad()
    def differentiate(self, batch: Batch, halves: Sequence[int] = (0, 1)) -> torch.Tensor:
        """Set the gradients of `loss` by hand and return it: autograd takes longer than most optimizers."""
        losses = []
        for i in halves:
            layer, inputs = (self.left, self.right)[i], batch.inputs[i]
            error = layer(inputs) - batch.goals[i]
            slope = error * (2.0 / error.numel())
            layer.weight.grad = slope.T @ inputs.conj()
            if layer.bias is not None:
                layer.bias.grad = slope.sum(0)
            losses.append(error.abs().square().mean())
        return torch.stack(losses).sum()


@contextmanager
def own_random_numbers(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Let torch draw from a seed for a while, and leave its generators as they were."""
    generators = [torch.default_generator]  # torch.manual_seed seeds every kind of device, and takes milliseconds
    if device is not None and device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
        generators.append(torch.cuda.default_generators[device.index or 0])
    before = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


def make_model(
    gradients: Literal["dense", "sparse", "graph"], parameters: str, dtype: torch.dtype, device: torch.device
) -> Halves:
    """Return a model with the one set of initial weights."""
    with own_random_numbers(0):
        model = Halves(bias=parameters != "matrices", sparse=gradients == "sparse")
    # rounded from one float32 draw, so that every dtype starts at the same place
    return model.to(device=device, dtype=dtype)


def make_batch(model: Halves, number: int) -> Batch:
    """Return what the model is shown at one step."""
    weight = next(model.parameters())
    return _batch(number, isinstance(model.left, nn.Embedding), weight.dtype, weight.device)


@cache
def _batch(number: int, of_indices: bool, dtype: torch.dtype, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(1000 + number)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    goals = drawn(BATCH, 4), drawn(BATCH, 2)
    if of_indices:
        left, right = (torch.randint(5, (BATCH,), generator=generator).to(device) for _ in range(2))
        return Batch((left, right), goals)
    return Batch((drawn(BATCH, 3), drawn(BATCH, 4)), goals)
