"""What an update is a share of: the forward and backward pass of a real transformer on real text."""

from typing import Any

import torch
from torch import nn

from benchmarks.clock import sample
from metaopt.lab.shapes import CONTEXT, LAYERS, WEIGHT_SCALE, WIDTH
from metaopt.lab.timing import Spread, spread
from metaopt.problem_class import Problem
from metaopt.registry import registry

BATCH = 8
TOKENS = BATCH * CONTEXT


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


def forward_and_backward(device: torch.device | str, dtype: torch.dtype, repeats: int = 5) -> Spread:
    """Return the seconds of a pass over one batch, the first one left out."""
    problem, model = text_problem(), text_model(device).to(dtype)
    batches = problem.batches(0, device)

    def one_pass() -> None:
        problem.loss(model, next(batches)).backward()  # type: ignore[no-untyped-call]

    def clear() -> None:
        model.zero_grad()

    seconds = [sample(torch.device(device), clear, one_pass, 1).device for _ in range(1 + repeats)]
    return spread(seconds[1:])


def share(update: float, pass_: float) -> float:
    """Return the share of an update in a whole training step: both in seconds."""
    return update / (update + pass_)
