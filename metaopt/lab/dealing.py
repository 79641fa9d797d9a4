"""Whether the batches of a problem can be dealt over ranks, tried on two examples before anything is trained."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from metaopt.errors import MetaoptError, ProblemError
from metaopt.lab.batches import examples, part
from metaopt.lab.device import random_state, set_random_state
from metaopt.problem_class import Problem

# relative; the sums of two examples differ by rounding
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Dealing:
    """What was seen at a first batch: the dtype of its loss, and whether some parameters have no part in it."""

    model: nn.Module
    batch: Any
    dtype: torch.dtype
    has_unused: bool

    def leave_no_trace(self, call: Callable[[], object]) -> None:
        """Call something that computes gradients; buffers, gradients and random numbers are then as before."""
        with _untouched(self.model):
            call()


def tried(problem: Problem, model: nn.Module, batch: Any) -> Dealing:
    """Raise ProblemError unless the loss of a batch is the mean of the losses of its examples; say what was seen.

    A loss that draws random numbers is not compared.
    """
    name = type(problem).__name__.lower()
    size = examples(batch, name)
    try:
        with _untouched(model):
            problem.loss(model, part(batch, 0, 2)).backward()  # type: ignore[no-untyped-call]
            unused = any(p.requires_grad and p.grad is None for p in model.parameters())
            model.eval()  # one example has no statistics of a batch, and nothing is dropped
            before = _random_state(model)
            each = [problem.loss(model, part(batch, i, i + 1)) for i in range(min(size, 2))]
            both = problem.loss(model, part(batch, 0, 2))
            is_random = any(not torch.equal(*pair) for pair in zip(before, _random_state(model), strict=True))
    except MetaoptError:
        raise
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ProblemError(
            f"a batch of {name} cannot be dealt over ranks: its loss of two rows of a batch raised {reason}. "
            f"Train it with one process"
        ) from error
    one, two = float(sum(loss.detach() for loss in each)) / len(each), float(both.detach())
    if not is_random and abs(one - two) > TOLERANCE * max(abs(one), abs(two)):
        raise ProblemError(
            f"a batch of {name} cannot be dealt over ranks: the loss of two examples is {two:.6g}, and the mean of "
            f"their losses {one:.6g}. Make the loss a mean over examples, or train with one process"
        )
    return Dealing(model, batch, both.dtype, unused)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put modes, buffers, gradients and random numbers back."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    before = _random_state(model)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        set_random_state(_device_of(model), before[1] if len(before) > 1 else None)
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, kept in buffers:
                buffer.copy_(kept)
        for p in model.parameters():
            p.grad = None


def _random_state(model: nn.Module) -> list[torch.Tensor]:
    """Return the states of the generators that a model's loss may draw from."""
    own = random_state(_device_of(model))
    return [torch.get_rng_state(), *([] if own is None else [own])]


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
