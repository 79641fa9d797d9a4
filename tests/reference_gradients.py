"""Rules of parts on gradients and updates on plain float64 tensors, from their papers: knows nothing of metaopt.

A rule is called with every parameter that has a gradient in the update, by its number.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Tensor = torch.Tensor
Tensors = dict[int, Tensor]


@dataclass
class Rule:
    """One part with the hyperparameters of each parameter, and what it keeps of each under (name, number)."""

    given: Sequence[dict[str, Any]]
    kept: dict[Any, Any] = field(default_factory=dict)

    def gradients(self, weights: list[Tensor], grads: Tensors, t: int) -> Tensors:
        """Return what the next part gets instead of the gradients; `t` updates were made."""
        return {i: self.gradient(i, weights[i], g, t, **self.given[i]) for i, g in grads.items()}

    def gradient(self, i: int, w: Tensor, g: Tensor, t: int, **given: Any) -> Tensor:
        return g

    def updates(self, weights: list[Tensor], grads: Tensors, updates: Tensors, t: int) -> Tensors:
        """Return what is added to the weights instead of the updates of the base."""
        return {i: self.update(i, grads[i], u, t, **self.given[i]) for i, u in updates.items()}

    def update(self, i: int, g: Tensor, u: Tensor, t: int, **given: Any) -> Tensor:
        return u


class Mars(Rule):
    """arXiv:2411.10438, section 3.1 with the gradient of the step before: c = g + gamma b / (1 - b) (g - g_before).

    c is cut to norm 1; the gradient before the first one is zero, as in the authors' code.
    """

    def gradient(self, i: int, w: Tensor, g: Tensor, t: int, *, gamma: float = 0.025, beta1: float = 0.95) -> Tensor:
        before = self.kept.get(i, torch.zeros_like(g))
        self.kept[i] = g
        c = g + gamma * beta1 / (1 - beta1) * (g - before)
        size = length(c)
        return c / size if size > 1 else c


class Grokfast(Rule):
    """arXiv:2405.20233, algorithm 2: mu <- alpha mu + (1 - alpha) g, g <- g + lamb mu; mu begins as the gradient."""

    def gradient(self, i: int, w: Tensor, g: Tensor, t: int, *, alpha: float = 0.98, lamb: float = 2.0) -> Tensor:
        self.kept[i] = alpha * self.kept[i] + (1 - alpha) * g if i in self.kept else g
        return g + lamb * self.kept[i]


class Orthograd(Rule):
    """arXiv:2501.04697: the gradient loses its part along the weights, and gets its norm back."""

    def gradient(self, i: int, w: Tensor, g: Tensor, t: int) -> Tensor:
        across = g - (w * g).sum() / ((w * w).sum() + 1e-30) * w
        if length(across) <= 4 * torch.finfo(g.dtype).eps * length(g):
            return torch.zeros_like(g)
        return across * (length(g) / (length(across) + 1e-30))


class GradientNoise(Rule):
    """arXiv:1511.06807: g + N(0, eta / (1 + t)^gamma); `kept[t, i]` is the standard normal noise, put there before."""

    def gradient(self, i: int, w: Tensor, g: Tensor, t: int, *, eta: float = 0.01, gamma: float = 0.55) -> Tensor:
        return g + math.sqrt(eta / (1 + t) ** gamma) * self.kept[t, i]


class Magma(Rule):
    """arXiv:2602.15322, algorithm 1: each tensor's update times its score, or zero; `kept[t, i]` holds the coins.

    score <- 0.9 score + 0.1 sigmoid(cos(mu, g) / tau), from 1; mu is the average of the gradients, this one included.
    """

    def update(
        self,
        i: int,
        g: Tensor,
        u: Tensor,
        t: int,
        *,
        keep: float = 0.5,
        tau: float = 2.0,
        smoothing: float = 0.9,
        beta: float = 0.9,
        seed: int = 0,
    ) -> Tensor:
        mu = self.kept["mu", i] = beta * self.kept.get(("mu", i), torch.zeros_like(g)) + (1 - beta) * g
        sizes = length(mu) * length(g)
        cosine = float((mu * g).sum()) / sizes if sizes else 0.0
        target = 1 / (1 + math.exp(-cosine / tau))
        score = self.kept["score", i] = smoothing * self.kept.get(("score", i), 1.0) + (1 - smoothing) * target
        return u * score * self.kept[t, i]


class Zclip(Rule):
    """arXiv:2504.02507, algorithm 1, and the authors' code for what the paper leaves open (the 1e-6, the warm-up)."""

    def gradients(self, weights: list[Tensor], grads: Tensors, t: int) -> Tensors:
        given = {"alpha": 0.97, "z_thresh": 2.5, "warmup": 25, "mode": "reciprocal"} | dict(self.given[0])
        norm = math.sqrt(sum(length(g) ** 2 for g in grads.values()))
        seen = self.kept.setdefault("seen", [])
        if len(seen) < given["warmup"]:
            seen.append(norm)
            self.kept["mean"] = sum(seen) / len(seen)
            self.kept["variance"] = sum((n - self.kept["mean"]) ** 2 for n in seen) / len(seen)
            return grads
        bound, mean, spread = norm, self.kept["mean"], math.sqrt(self.kept["variance"])
        z, z_thresh, alpha = (norm - mean) / (spread + 1e-6), given["z_thresh"], given["alpha"]
        if z > z_thresh:
            reach = {"reciprocal": z_thresh**2 / z, "mean": 0.0, "max": z_thresh}[given["mode"]]
            bound = mean + reach * spread
        self.kept["mean"] = alpha * mean + (1 - alpha) * bound
        self.kept["variance"] = alpha * self.kept["variance"] + (1 - alpha) * (bound - self.kept["mean"]) ** 2
        return {i: g * bound / (norm + 1e-6) if bound < norm else g for i, g in grads.items()}


class SkipSpikes(Rule):
    """No update from a norm that is `sigma` deviations above the mean of the last `window`, half of them known."""

    def is_spike(self, grads: Tensors) -> bool:
        given, norm = self.given[0], math.sqrt(sum(length(g) ** 2 for g in grads.values()))
        seen = self.kept.setdefault("seen", [])[-given["window"] :]
        bound = math.inf
        if 2 * len(seen) >= given["window"]:
            mean = sum(seen) / len(seen)
            spread = math.sqrt(sum((n - mean) ** 2 for n in seen) / len(seen))
            bound = mean + given["sigma"] * max(spread, mean / 1000)
        if math.isfinite(norm):
            self.kept["seen"].append(min(norm, bound))
        return math.isfinite(norm) and norm > bound


class Mechanic(Rule):
    """arXiv:2306.00144, algorithm 1 with the decay of its section 3, and h cut as in optax.contrib.mechanize.

    x_0 + s (Delta + u) instead of x + u, with Delta = (x - x_0) / s: every step tells how far h = <g, -Delta> the way
    so far has gone down, and n bettors with memories 1 - 10^-i bet on it; s is the sum of what they bet.
    """

    def updates(self, weights: list[Tensor], grads: Tensors, updates: Tensors, t: int) -> Tensors:
        given = {"s_init": 1e-6, "num_betas": 6, "eps": 1e-8, "weight_decay": 1e-2} | dict(self.given[0])
        n, eps, kept = given["num_betas"], given["eps"], self.kept
        if "s" not in kept:
            kept.update(s=[given["s_init"]] * n, m=[0.0] * n, v=[0.0] * n, r=[0.0] * n)
        for i in updates:
            kept.setdefault(i, weights[i])
        total = sum(kept["s"])
        way = {i: (kept[i] - weights[i]) / (total + eps) for i in updates}
        decay = given["weight_decay"] * total * norm_of(grads) / (norm_of({i: weights[i] for i in updates}) + eps)
        h = sum(float(((g + decay * weights[i]) * way[i]).sum()) for i, g in grads.items())
        for j in range(n):
            beta = 1 - 0.1 ** (j + 1)
            kept["r"][j] = beta * kept["r"][j] + min(max(h, -kept["m"][j]), kept["m"][j]) * kept["s"][j]
            kept["m"][j] = max(beta * kept["m"][j], abs(h) + eps)
            kept["v"][j] = beta**2 * kept["v"][j] + h**2
            wealth = given["s_init"] / n * kept["m"][j] + max(kept["r"][j], 0.0)
            kept["s"][j] = wealth / (math.sqrt(kept["v"][j]) + eps)
        return {i: kept[i] - sum(kept["s"]) * (way[i] - u) - weights[i] for i, u in updates.items()}


def length(t: Tensor) -> float:
    return float((t * t).sum()) ** 0.5


def norm_of(tensors: Tensors) -> float:
    return math.sqrt(sum(length(t) ** 2 for t in tensors.values()))


class Base:
    """SGD with momentum, Adam or AdamW as in their papers: returns what it would add to a parameter."""

    def __init__(self, name: str, lrs: Sequence[float], momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        self.name, self.lrs, self.momentum, self.weight_decay = name, lrs, momentum, weight_decay
        self.kept: dict[int, list[Any]] = {}

    def update(self, i: int, w: Tensor, g: Tensor) -> Tensor:
        kept = self.kept.setdefault(i, [0, torch.zeros_like(g), torch.zeros_like(g)])
        if self.name == "sgd":
            kept[1] = self.momentum * kept[1] + g
            return -self.lrs[i] * kept[1]
        kept[0] += 1
        kept[1] = 0.9 * kept[1] + 0.1 * g
        kept[2] = 0.999 * kept[2] + 0.001 * g * g
        direction = kept[1] / (1 - 0.9 ** kept[0]) / ((kept[2] / (1 - 0.999 ** kept[0])).sqrt() + 1e-8)
        return -self.lrs[i] * (direction + (self.weight_decay * w if self.name == "adamw" else 0.0))


class PlainRun:
    """Weights, a base, and one rule before or behind it."""

    def __init__(self, weights: Sequence[Tensor], base: Base, rule: Rule) -> None:
        self.weights, self.base, self.rule, self.t = [w.clone() for w in weights], base, rule, 0

    def step(self, gradient: Callable[[int, Tensor], Tensor], present: Sequence[bool]) -> None:
        grads = {i: gradient(i, w) for i, w in enumerate(self.weights) if present[i]}
        grads = self.rule.gradients(self.weights, grads, self.t)
        updates = {i: self.base.update(i, self.weights[i], g) for i, g in grads.items()}
        for i, u in self.rule.updates(self.weights, grads, updates, self.t).items():
            self.weights[i] = self.weights[i] + u
        self.t += 1
