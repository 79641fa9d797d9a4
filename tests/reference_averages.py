"""The rules of averages and of steps that are taken at averages, from the papers, on plain float64 tensors.

Knows nothing of metaopt. Every sequence of a paper is kept in full, even one that another could be worked out from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Tensor = torch.Tensor
Schedule = Callable[[int], float]


@dataclass
class Held:
    """One parameter: its weights, the base's state, and the sequences of every part by label."""

    weights: Tensor
    group: int
    lr: Schedule
    base: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    begun: bool = False


class Rule:
    """One part: what it does to a step of the base, and what it does after the weights have changed."""

    # it acts after the weights have changed: a part behind it changes the update later still
    behind = False

    def begin(self, label: str, held: Held) -> None:
        held.parts[label] = {"x": held.weights, "z": held.weights, "m": torch.zeros_like(held.weights)}

    def open_update(self, t: int, lrs: dict[int, float]) -> None:
        """Work out what a whole group shares; `t` updates have been made, `lrs` are the rates of the groups."""

    def step(self, mine: dict[str, Any], held: Held, u: Tensor) -> Tensor:
        """Return the step that is made in the place of `u`."""
        return u

    def moved(self, mine: dict[str, Any], y: Tensor) -> None:
        """Follow a part nearer the base that has set the weights of a parameter without a gradient to `y`."""

    def after(self, label: str, t: int, everything: Sequence[Held]) -> list[Held]:
        """Act after update `t`; return whom it moved."""
        return []

    def shown(self, label: str, held: Held) -> Tensor:
        x: Tensor = held.parts[label]["x"] if held.begun else held.weights
        return x


@dataclass
class Interpolated(Rule):
    """x and z are averaged into the point y where gradients are taken: y = mu x + (1 - mu) z."""

    mu: float
    mu_x: float | None = None  # arXiv:2512.17131; None: arXiv:2405.15682 with the fields below
    r: float = 0.0
    weight_lr_power: float = 2.0
    weight_decay_at_y: float = 0.0
    lr_max: dict[int, float] = field(default_factory=dict)
    weight_sum: dict[int, float] = field(default_factory=dict)
    share: dict[int, float] = field(default_factory=dict)
    lrs: dict[int, float] = field(default_factory=dict)

    def open_update(self, t: int, lrs: dict[int, float]) -> None:
        self.lrs = lrs
        for group, lr in lrs.items():
            if self.mu_x is not None:
                self.share[group] = 1 - self.mu_x
                continue
            self.lr_max[group] = max(lr, self.lr_max.get(group, 0.0))
            weight = (t + 1) ** self.r * self.lr_max[group] ** self.weight_lr_power
            self.weight_sum[group] = self.weight_sum.get(group, 0.0) + weight
            self.share[group] = weight / self.weight_sum[group] if self.weight_sum[group] else 0.0

    def step(self, mine: dict[str, Any], held: Held, u: Tensor) -> Tensor:
        c = self.share[held.group]
        y = held.weights
        mine["z"] = mine["z"] + u - self.lrs[held.group] * self.weight_decay_at_y * y
        mine["x"] = (1 - c) * mine["x"] + c * mine["z"]
        return self.mu * mine["x"] + (1 - self.mu) * mine["z"] - y

    def moved(self, mine: dict[str, Any], y: Tensor) -> None:
        mine["x"] = (y - (1 - self.mu) * mine["z"]) / self.mu


@dataclass
class EmaNesterov(Rule):
    """y = x + beta m; x' = y + u; m' = gamma m + (1 - gamma) (x' - x); y' = x' + beta' m'. arXiv:2605.25395"""

    beta: Schedule
    gamma: float
    ahead: dict[int, float] = field(default_factory=dict)
    following: dict[int, float] = field(default_factory=dict)

    def open_update(self, t: int, lrs: dict[int, float]) -> None:
        for group in lrs:
            self.ahead[group] = self.following.get(group, 0.0)
            self.following[group] = self.beta(t)

    def step(self, mine: dict[str, Any], held: Held, u: Tensor) -> Tensor:
        y = held.weights
        # not kept but read off, for parameters that had no gradient when beta last changed
        mine["x"] = y - self.ahead[held.group] * mine["m"]
        new = y + u
        mine["m"] = self.gamma * mine["m"] + (1 - self.gamma) * (new - mine["x"])
        mine["x"] = new
        return new + self.following[held.group] * mine["m"] - y

    def shown(self, label: str, held: Held) -> Tensor:
        if not held.begun:
            return held.weights
        shown: Tensor = held.weights - self.following[held.group] * held.parts[label]["m"]
        return shown


@dataclass
class Samples(Rule):
    """The mean of samples of the weights, taken every so many updates: all since `start`, or only the last few."""

    every: int
    start: int = 0
    last: int | None = None
    behind = True
    taken: dict[int, list[Tensor]] = field(default_factory=dict)

    def after(self, label: str, t: int, everything: Sequence[Held]) -> list[Held]:
        if t > self.start and t % self.every == 0:
            for held in everything:
                self.taken.setdefault(id(held), []).append(held.weights)
        return []

    def shown(self, label: str, held: Held) -> Tensor:
        samples = self.taken.get(id(held), [])
        samples = samples if self.last is None else samples[-self.last :]
        return torch.stack(samples).mean(0) if samples else held.weights


@dataclass
class Ema(Rule):
    """x <- d x + (1 - d) w every so many updates; up to update `start` it is w. doi:10.1137/0330046"""

    decay: float
    warmup: bool = False
    begins: int = 0
    every: int = 1
    behind = True
    updates: int = 0
    number: int = 0

    def after(self, label: str, t: int, everything: Sequence[Held]) -> list[Held]:
        self.updates = t
        if t % self.every:
            return []
        self.number += t > self.begins
        d = min(self.decay, (1 + self.number) / (10 + self.number)) if self.warmup else self.decay
        for held in everything:
            if held.begun:
                x = held.parts[label]["x"]
                held.parts[label]["x"] = held.weights if t <= self.begins else d * x + (1 - d) * held.weights
        return []

    def shown(self, label: str, held: Held) -> Tensor:
        return held.weights if self.updates <= self.begins else super().shown(label, held)


@dataclass
class Lookahead(Rule):
    """slow <- slow + alpha (fast - slow); fast <- slow, every k updates. arXiv:1907.08610"""

    k: int
    alpha: float = 0.5
    behind = True

    def after(self, label: str, t: int, everything: Sequence[Held]) -> list[Held]:
        pulled = [held for held in everything if held.begun and t % self.k == 0]
        for held in pulled:
            slow = held.parts[label]["x"]
            held.weights = held.parts[label]["x"] = slow + self.alpha * (held.weights - slow)
        return pulled


class PlainRun:
    """Steps parameters by the rules of a base and of the parts behind it, in the order in which they are written."""

    def __init__(self, weights: list[Tensor], groups: list[list[int]], lrs: list[Schedule], base: dict[str, Any]):
        self.held = [Held(w, 0, lrs[0]) for w in weights]
        for number, members in enumerate(groups):
            for i in members:
                self.held[i].group, self.held[i].lr = number, lrs[number]
        self.base, self.updates = base, 0
        self.parts: dict[str, Rule] = {}

    def step(self, grads: Sequence[Tensor | None]) -> None:
        present = [(h, g) for h, g in zip(self.held, grads, strict=True) if g is not None]
        lrs = {h.group: h.lr(self.updates) for h, _ in present}
        for rule in self.parts.values():
            rule.open_update(self.updates, lrs)
        first = next((n for n, rule in enumerate(self.parts.values()) if rule.behind), len(self.parts))
        before = {id(held): held.weights for held, _ in present}
        for held, grad in present:
            if not held.begun:
                held.begun = True
                for label, rule in self.parts.items():
                    rule.begin(label, held)
            u = base_step(held, self.base, grad, lrs[held.group])
            for label, rule in list(self.parts.items())[:first]:
                u = rule.step(held.parts[label], held, u)
            held.weights = held.weights + u
        self.updates += 1
        for number, (label, rule) in enumerate(self.parts.items()):
            for held, _ in present if number > first else []:
                # what parts nearer the base have moved is part of the step
                u, held.weights = held.weights - before[id(held)], before[id(held)]
                stepped = rule.step(held.parts[label], held, u)
                held.weights = held.weights + stepped
                if stepped is not u:
                    self._follow(held, number, had_gradient=True)
            for held in rule.after(label, self.updates, self.held):
                self._follow(held, number, had_gradient=id(held) in before)

    def _follow(self, held: Held, mover: int, *, had_gradient: bool) -> None:
        """Tell the other parts of one parameter where a part has set its weights."""
        for number, (label, rule) in enumerate(self.parts.items()):
            mine = held.parts[label]
            if number < mover:  # what is nearer the base begins anew from there
                mine["x"] = mine["z"] = held.weights
            elif number > mover and not had_gradient:
                rule.moved(mine, held.weights)


def base_step(held: Held, base: dict[str, Any], g: Tensor, lr: float) -> Tensor:
    """Return the step of SGD, Adam or AdamW from a parameter's weights, and keep its state."""
    state, decay = held.base, base.get("weight_decay", 0.0)
    if base["name"] == "sgd":
        momentum = base.get("momentum", 0.0)
        state["buffer"] = momentum * state["buffer"] + g if "buffer" in state else g
        return -lr * state["buffer"]
    b1, b2 = base.get("betas", (0.9, 0.999))
    n = state["n"] = state.get("n", 0) + 1
    state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * g
    state["v"] = b2 * state.get("v", 0.0) + (1 - b2) * g**2
    direction = state["m"] / (1 - b1**n) / ((state["v"] / (1 - b2**n)).sqrt() + 1e-8)
    step: Tensor = -lr * direction - lr * decay * held.weights
    return step
