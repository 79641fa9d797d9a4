"""Local SGD, DiLoCo (arXiv:2311.08105) and Streaming DiLoCo (arXiv:2501.18512) on plain tensors, in one process."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Tensors = list[torch.Tensor]
# of a worker, its step and its weights; None for a parameter that has no gradient then
Gradients = Callable[[int, int, Tensors], list[torch.Tensor | None]]


@dataclass
class Rule:
    """The outer step; with `alpha` that of Lookahead, otherwise Nesterov momentum."""

    k: int
    lr: float = 0.7
    momentum: float = 0.9
    alpha: float | None = None
    # contiguous lists of positions
    fragments: tuple[tuple[int, ...], ...] = ()
    delay: int = 0
    blend: float = 0.5
    rounded: torch.dtype | None = None


def simulated(
    starts: Tensors, workers: int, steps: int, gradients: Gradients, rule: Rule, *, lr: float, momentum: float
) -> list[list[Tensors]]:
    """Return the weights of each worker after each step of SGD with momentum, between outer steps."""
    fast = [[w.clone() for w in starts] for _ in range(workers)]
    slow, buffer = [w.clone() for w in starts], [torch.zeros_like(w) for w in starts]
    momenta: list[list[torch.Tensor | None]] = [[None] * len(starts) for _ in range(workers)]
    fragments = rule.fragments or (tuple(range(len(starts))),)
    coming: dict[tuple[int, int], list[torch.Tensor]] = {}
    history: list[list[Tensors]] = []
    for step in range(1, steps + 1):
        for worker in range(workers):
            for i, gradient in enumerate(gradients(worker, step, fast[worker])):
                if gradient is not None:
                    held = momenta[worker][i]
                    held = gradient if held is None else momentum * held + gradient
                    momenta[worker][i] = held
                    fast[worker][i] = fast[worker][i] - lr * held
        for number, members in enumerate(fragments):
            begin = rule.k * (number + 1) // len(fragments)
            if step >= begin and (step - begin) % rule.k == 0:
                coming[number, step + rule.delay] = [_mean(fast, slow, i, rule.rounded) for i in members]
            if (number, step) not in coming:
                continue
            for i, way in zip(members, coming.pop((number, step)), strict=True):
                if rule.alpha is not None:
                    slow[i] = slow[i] + rule.alpha * way
                else:
                    buffer[i] = rule.momentum * buffer[i] - way
                    slow[i] = slow[i] - rule.lr * (rule.momentum * buffer[i] - way)
                for own in fast:
                    own[i] = rule.blend * own[i] + (1 - rule.blend) * slow[i] if rule.delay else slow[i].clone()
        history.append([[w.clone() for w in own] for own in fast])
    return history


def _mean(fast: list[Tensors], slow: Tensors, i: int, rounded: torch.dtype | None) -> torch.Tensor:
    ways = [own[i] - slow[i] for own in fast]
    if rounded is None:
        return sum(ways[1:], ways[0]) / len(ways)
    small = [way.to(rounded) for way in ways]
    return (sum(small[1:], small[0]) / len(ways)).to(slow[i].dtype)
