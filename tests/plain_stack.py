"""The rules of the built-in parts on plain float64 tensors, for stacks of any make-up: knows nothing of metaopt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Tensor = torch.Tensor
Gradient = Callable[[int, Tensor], Tensor]
MOMENTS = ("m", "v", "n", "buffer", "sum")


@dataclass(frozen=True)
class Rule:
    """One part: its name, its label, its hyperparameters."""

    name: str
    label: str
    given: dict[str, Any]

    def __str__(self) -> str:
        arguments = [f"{key}={value!r}" for key, value in self.given.items()]
        label = [] if self.label == self.name else [f"label={self.label!r}"]
        return f"{self.name}({', '.join([*arguments, *label])})"


@dataclass
class Lane:
    """One base with the wrappers that are its own."""

    before: list[Rule]
    base: Rule
    behind: list[Rule]

    def __str__(self) -> str:
        return " | ".join(map(str, [*self.before, self.base, *self.behind]))


@dataclass
class Held:
    """One parameter: its weights, its lane, its rate, and what the parts keep of it under (label, name)."""

    weights: Tensor
    lane: str
    lr: float
    state: dict[tuple[str, str], Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    begun: bool = False
    sum: Tensor | None = None


class PlainStack:
    """Steps parameters by the rules, part by part in the order in which gradients and weights flow."""

    def __init__(self, before: list[Rule], lanes: dict[str, Lane], behind: list[Rule]) -> None:
        self.before, self.lanes, self.behind = before, lanes, behind
        self.held: list[Held] = []
        self.updates = self.seen = 0

    def step(self, gradient: Gradient, present: Sequence[bool]) -> None:
        grads = {i: gradient(i, h.weights) for i, h in enumerate(self.held) if present[i]}
        for rule in self.before:
            if rule.name == "sam" and grads:
                norm = _norm(grads.values())
                grads = {i: gradient(i, self.held[i].weights + rule.given["rho"] * g / norm) for i, g in grads.items()}
        if not grads:
            return
        for rule in self.before:
            if not self._filter(rule, grads):
                return
        for name, lane in self.lanes.items():
            own = {i: g for i, g in grads.items() if self.held[i].lane == name}
            for rule in lane.before if own else []:
                self._filter(rule, own)
            grads.update(own)
        start = {i: self.held[i].weights for i in grads}
        for i in grads:
            for rule in [*self.before, *self.lanes[self.held[i].lane].before]:
                if rule.name == "decay":
                    self.held[i].weights = self.held[i].weights * (1 - self.held[i].lr * rule.given["weight_decay"])
        previous = {i: self.held[i].weights for i in grads}
        for i, g in grads.items():
            _update(self.held[i], self.lanes[self.held[i].lane].base, g)
        self.updates += 1
        for i in grads:
            if not self.held[i].begun:
                self._begin(self.held[i], start[i])
        for i, h in enumerate(self.held):
            if h.begun:
                self._follow(h, previous.get(i), grads.get(i))

    def reset_moments(self) -> None:
        for h in self.held:
            h.base.clear()

    def _filter(self, rule: Rule, grads: dict[int, Tensor]) -> bool:
        """Change the gradients; return False where the update is held back."""
        if rule.name == "accumulate":
            self.seen += 1
            for h in self.held:
                h.sum = torch.zeros_like(h.weights) if self.seen == 1 and h.sum is not None else h.sum
            for i, g in grads.items():
                gathered = self.held[i].sum
                self.held[i].sum = g if gathered is None else gathered + g
            if self.seen < rule.given["steps"]:
                return False
            self.seen = 0
            grads.update({i: h.sum / rule.given["steps"] for i, h in enumerate(self.held) if h.sum is not None})
        elif rule.name == "clip_grad_norm":
            factor = min(1.0, rule.given["max_norm"] / (float(_norm(grads.values())) + 1e-6))
            grads.update({i: g * factor for i, g in grads.items()})
        else:
            grads.update({i: _changed(rule, g, self.held[i].weights) for i, g in grads.items()})
        return True

    def _begin(self, h: Held, start: Tensor) -> None:
        h.begun = True
        for rule in [*self.lanes[h.lane].behind, *self.behind]:
            h.state[rule.label, "kept"] = start
            h.state[rule.label, "buffer"] = torch.zeros_like(start)

    def _follow(self, h: Held, previous: Tensor | None, grad: Tensor | None) -> None:
        """Let the wrappers behind the base act on one parameter, the nearest first."""
        nearer: list[str] = []
        for rule in [*self.lanes[h.lane].behind, *self.behind]:
            kept, given = (rule.label, "kept"), rule.given
            if rule.name == "ema":
                d = min(given["decay"], (1 + self.updates) / (10 + self.updates)) if given["warmup"] else given["decay"]
                h.state[kept] = d * h.state[kept] + (1 - d) * h.weights
                continue
            if rule.name == "cautious":
                if previous is None or grad is None:
                    continue
                u = h.weights - previous
                mask = (u * grad < 0).double()
                h.weights = previous + u * mask / mask.mean().clamp(min=1e-3) if u.numel() else u
            elif self.updates % given["k"]:
                nearer.append(rule.label)
                continue
            elif rule.name == "lookahead":
                h.weights = h.state[kept] = h.state[kept] + given["alpha"] * (h.weights - h.state[kept])
                _treat_moments(h, rule)
            else:
                way, momentum = h.state[kept] - h.weights, given["momentum"]
                buffer = h.state[rule.label, "buffer"] = momentum * h.state[rule.label, "buffer"] + way
                h.weights = h.state[kept] = h.state[kept] - given["lr"] * (momentum * buffer + way)
            for label in nearer:  # slow weights nearer the base follow who moves the weights
                h.state[label, "kept"] = h.weights
            nearer += [] if rule.name == "cautious" else [rule.label]


def _norm(tensors: Any) -> Tensor:
    return torch.sqrt(sum((t**2).sum() for t in tensors))


def _changed(rule: Rule, g: Tensor, w: Tensor) -> Tensor:
    rows = tuple(range(1, g.dim()))
    if rule.name == "l2":
        return g + rule.given["weight_decay"] * w
    if rule.name == "clip_grad_value":
        return g.clamp(-rule.given["clip_value"], rule.given["clip_value"])
    if rule.name == "centralize" and rows and g.numel():
        return g - g.mean(rows, keepdim=True)
    if rule.name == "adaptive_grad_clip":
        bound, size = (_norms(t, rows) for t in (w, g))
        bound = rule.given["clipping"] * bound.clamp(min=1e-3)
        return g * torch.where(size > bound, bound / size, 1.0)
    return g


def _norms(t: Tensor, rows: tuple[int, ...]) -> Tensor:
    return torch.sqrt((t**2).sum(rows, keepdim=True) if rows else (t**2).sum())


def _update(h: Held, base: Rule, g: Tensor) -> None:
    state, given = h.base, base.given
    if base.name == "sgd":
        if "momentum" in given:
            state["buffer"] = given["momentum"] * state["buffer"] + g if "buffer" in state else g
        h.weights = h.weights - h.lr * state.get("buffer", g)
    elif base.name == "adagrad":
        state["sum"] = state.get("sum", 0.0) + g**2
        h.weights = h.weights - h.lr * g / (state["sum"].sqrt() + 1e-10)
    else:
        h.weights = h.weights * (1 - h.lr * given.get("weight_decay", 0.0))
        n = state["n"] = state.get("n", 0) + 1
        state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * g
        state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * g**2
        h.weights = h.weights - h.lr * state["m"] / (1 - 0.9**n) / ((state["v"] / (1 - 0.999**n)).sqrt() + 1e-8)


def _treat_moments(h: Held, rule: Rule) -> None:
    way, alpha = rule.given.get("pullback_momentum", "none"), rule.given["alpha"]
    if way == "reset":
        h.base.clear()
    elif way == "pullback":
        for key in [key for key in h.base if key != "n"]:
            cached = h.state.get((rule.label, key), 0.0)
            h.base[key] = h.state[rule.label, key] = alpha * h.base[key] + (1 - alpha) * cached
