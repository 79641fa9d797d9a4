"""References as an author hands them in: built-in parts against their rules on plain float64 tensors."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch

from metaopt.testing import CHECKS, cases, outcome

Tensor = torch.Tensor
Gradients = list[Callable[[Tensor], Tensor]]
Update = Callable[[Tensor, Tensor], Tensor]


def sgd(x: Tensor, gradients: Gradients, *, lr: float, momentum: float) -> Iterator[Tensor]:
    buffer = torch.zeros_like(x)
    for gradient in gradients:
        buffer = momentum * buffer + gradient(x)
        x = x - lr * buffer
        yield x


def adam(
    x: Tensor, gradients: Gradients, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> Iterator[Tensor]:
    m = v = torch.zeros_like(x)
    for t, gradient in enumerate(gradients, 1):
        g = gradient(x) + weight_decay * x
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        x = x - lr * m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        yield x


def lookahead(
    x: Tensor, gradients: Gradients, update: Update, *, k: int, alpha: float
) -> Iterator[tuple[Tensor, Tensor]]:
    slow = x
    for t, gradient in enumerate(gradients, 1):
        x = update(x, gradient(x))
        if t % k == 0:
            slow = x = slow + alpha * (x - slow)
        yield x, slow


def ema(x: Tensor, gradients: Gradients, update: Update, *, decay: float) -> Iterator[tuple[Tensor, Tensor]]:
    average = x
    for gradient in gradients:
        x = update(x, gradient(x))
        average = decay * average + (1 - decay) * x
        yield x, average


def clip_grad_norm(x: Tensor, gradients: Gradients, update: Update, *, max_norm: float) -> Iterator[Tensor]:
    for gradient in gradients:
        g = gradient(x)
        x = update(x, g * min(1.0, max_norm / (float(g.norm()) + 1e-6)))
        yield x


def sam(x: Tensor, gradients: Gradients, update: Update, *, rho: float) -> Iterator[Tensor]:
    for gradient in gradients:
        g = gradient(x)
        x = update(x, gradient(x + rho * g / (g.norm() + 1e-12)))
        yield x


def warmup_and_cosine(t: int, run: int) -> float:
    return 0.1 * t / 10 if t < 10 else 0.05 * (1 + math.cos(math.pi * min((t - 10) / (run - 10), 1.0)))


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("sgd(lr=0.1, momentum=0.9)", sgd),
        ("adam(lr=0.01, weight_decay=0.1)", adam),
        ("lookahead(k=3, alpha=0.8)", lookahead),
        ("ema(decay=0.9)", ema),
        ("clip_grad_norm(1.5)", clip_grad_norm),
        ("sam(rho=0.1)", sam),
        ("warmup(cosine(0.1), 10)", warmup_and_cosine),
    ],
)
def test_a_built_in_part_agrees_with_its_rule(text: str, reference: Callable[..., object]) -> None:
    (case,) = cases(text, reference=reference)
    check = "follows_its_reference" if text.startswith("warmup") else "agrees_with_its_reference"
    result = outcome(case, CHECKS[check])
    assert result.status == "passed", result.reason


def test_a_rule_that_is_a_little_wrong_is_not_taken_for_the_part_s() -> None:
    def almost(x: Tensor, gradients: Gradients, update: Update, *, decay: float) -> Iterator[tuple[Tensor, Tensor]]:
        for x, average in ema(x, gradients, update, decay=decay):  # noqa: B020
            yield x, average * (1 + 1e-9)

    (case,) = cases("ema(decay=0.9)", reference=almost)
    result = outcome(case, CHECKS["agrees_with_its_reference"])
    assert result.status == "failed"
    assert "inside averaged() after step 1" in result.reason
