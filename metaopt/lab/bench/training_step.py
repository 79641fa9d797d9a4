"""What an update is a share of: the forward and backward pass of a real transformer on real text."""

import torch

from metaopt.lab.bench.clock import sample
from metaopt.lab.bench.rounds import Spread, spread
from metaopt.lab.bench.shapes import BATCH, CONTEXT, text_model, text_problem

TOKENS = BATCH * CONTEXT


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
