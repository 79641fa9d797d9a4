"""The rules of the built-in parts on plain float64 tensors, for stacks of any make-up: knows nothing of metaopt."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import reference_averages as averages
import reference_gradients as gradients
import reference_updates as updates
import torch

Tensor = torch.Tensor
Gradient = Callable[[int, Tensor], Tensor]
# rules on the update of one tensor, on gradients, and with an average or a point beside the weights
ON_UPDATE = (
    "cautious",
    "cautious_decay",
    "clip_update_rms",
    "hyperball",
    "radial_brake",
    "trust_ratio",
    "update_floor",
)
ON_GRADIENTS = {
    "gradient_noise": gradients.GradientNoise,
    "grokfast": gradients.Grokfast,
    "mars": gradients.Mars,
    "orthograd": gradients.Orthograd,
    "skip_spikes": gradients.SkipSpikes,
    "zclip": gradients.Zclip,
}
AVERAGING: dict[str, Callable[..., averages.Rule]] = {
    "gpa": lambda mu_x, mu_y: averages.Interpolated(mu_y, mu_x=mu_x),
    "schedule_free": lambda momentum, **given: averages.Interpolated(momentum, **given),
    "ema_nesterov": lambda beta, gamma: averages.EmaNesterov(lambda t: beta, gamma),
    "tail_average": lambda every, start: averages.Samples(every, start),
    "lawa": lambda k, n: averages.Samples(k, last=n),
}
ANCHORED = ("lookahead", "outer", "gpa", "schedule_free")
# they act when the weights have changed: a rule on the update that is written behind one changes them once more
AFTER = ("lookahead", "outer", "ema", "tail_average", "lawa", "clip_update_norm", "mechanic")
SHOWN = ("lookahead", "outer", "ema", *AVERAGING)
MOST_PARAMETERS = 99


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
    # the bases that follow, by the number of updates after which each begins
    later: dict[int, Rule] = field(default_factory=dict)

    def __str__(self) -> str:
        base, done = [str(self.base)], 0
        for begin, follower in self.later.items():
            base += [str(begin - done), str(follower)]
            done = begin
        text = f"switch({', '.join(base)})" if self.later else base[0]
        return " | ".join([*map(str, self.before), text, *map(str, self.behind)])


@dataclass
class Held:
    """One parameter: its weights, its lane, its rate, and what the parts keep of it under (label, name)."""

    weights: Tensor
    lane: str
    lr: float
    group: int = 0
    state: dict[tuple[str, str], Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    begun: bool = False
    sum: Tensor | None = None


class PlainStack:
    """Steps parameters by the rules, part by part in the order in which gradients and weights flow."""

    def __init__(self, before: list[Rule], lanes: dict[str, Lane], behind: list[Rule]) -> None:
        self.before, self.lanes, self.behind = before, lanes, behind
        self.held: list[Held] = []
        self.updates = self.seen = 0
        self.plateaus: dict[str, dict[str, Any]] = {}
        own = [rule for lane in lanes.values() for rule in [*lane.before, *lane.behind]]
        self.rules = {rule.label: rule for rule in [*before, *own, *behind]}
        self.parts = {label: part for label, rule in self.rules.items() if (part := _part(rule)) is not None}

    def add(self, held: Held) -> None:
        """Add a parameter: until its first gradient it was always where it is."""
        for part in self.parts.values():
            if isinstance(part, averages.Samples):
                number = max(map(len, part.taken.values()), default=0)
                part.taken[id(held)] = [held.weights] * number
        self.held.append(held)

    def split(self, members: Sequence[Held], group: int) -> None:
        """Give some parameters of one group a group of their own, with the same numbers."""
        for part in self.parts.values():
            for numbers in vars(part).values() if isinstance(part, averages.Rule) else ():
                if isinstance(numbers, dict) and members[0].group in numbers:
                    numbers[group] = numbers[members[0].group]
        for held in members:
            held.group = group

    def shown(self, label: str, held: Held) -> Tensor:
        """Return what the average called `label` shows of a parameter."""
        part = self.parts.get(label)
        if self.rules[label].name == "ema" and self.updates <= self.rules[label].given["start"]:
            return held.weights
        if part is None or label not in held.parts:
            return held.state.get((label, "kept"), held.weights)
        if isinstance(part, averages.Interpolated):
            part.moved(held.parts[label], held.weights)
        return part.shown(label, held)

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
        for name, lane in self.lanes.items():
            own = {i: g for i, g in grads.items() if self.held[i].lane == name}
            for rule in lane.behind:
                self._act(rule, [h for h in self.held if h.lane == name], previous, own)
        for rule in self.behind:
            self._act(rule, self.held, previous, grads)
        self._change_base()

    def record(self, value: float) -> None:
        """Lower the rates that a plateau drives if the value has not improved for too long."""
        for scope, rules in [(self.held, self.behind), *((None, lane.behind) for lane in self.lanes.values())]:
            for rule in (rule for rule in rules if rule.name == "plateau"):
                kept = self.plateaus.setdefault(rule.label, {"best": math.inf, "worse": 0, "rest": 0})
                improved = value < kept["best"] * (1 - 1e-4)
                kept["best"] = value if improved else kept["best"]
                kept["worse"] = 0 if improved or kept["rest"] else kept["worse"] + 1
                kept["rest"] = max(0, kept["rest"] - 1)
                if kept["worse"] > rule.given["patience"]:
                    kept.update(worse=0, rest=rule.given["cooldown"])
                    lanes = [name for name, lane in self.lanes.items() if rule in lane.behind]
                    for h in self.held if scope is not None else [h for h in self.held if h.lane in lanes]:
                        lower = max(h.lr * rule.given["factor"], rule.given["min_lr"])
                        h.lr = lower if h.lr - lower > 1e-8 else h.lr

    def _change_base(self) -> None:
        """Put the next base in the place of the one that is on: it begins anew, and what is kept of moments too."""
        for n, lane in self.lanes.items():
            follower = lane.later.pop(self.updates, None)
            if follower is None:
                continue
            lane.base = follower
            for h in (h for h in self.held if h.lane == n):
                h.base.clear()
                h.lr = follower.given["lr"]
                for label, key in [*h.state]:
                    if self.rules[label].name == "lookahead" and key in ("buffer", "m", "v", "sum"):
                        del h.state[label, key]

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
        elif rule.name == "skip_spikes":
            is_spike = self.parts[rule.label].is_spike(grads)
            for i in grads if is_spike else ():  # it has had a gradient, though a sum of gradients has not seen it
                h = self.held[i]
                h.sum = torch.zeros_like(h.weights) if h.sum is None else h.sum
            return not is_spike
        elif rule.name == "clip_grad_norm":
            factor = min(1.0, rule.given["max_norm"] / (float(_norm(grads.values())) + 1e-6))
            grads.update({i: g * factor for i, g in grads.items()})
        elif rule.name in ON_GRADIENTS:
            weights = [h.weights for h in self.held]
            for i, g in grads.items() if rule.name == "gradient_noise" else ():
                self.parts[rule.label].kept[self.updates, i] = self._draw(torch.randn, rule, self.updates, i, g.shape)
            grads.update(self.parts[rule.label].gradients(weights, grads, self.updates))
        else:
            grads.update({i: _changed(rule, g, self.held[i].weights) for i, g in grads.items()})
        return True

    def _begin(self, h: Held, start: Tensor) -> None:
        h.begun = True
        for rule in [*self.lanes[h.lane].behind, *self.behind]:
            h.state[rule.label, "kept"] = start
            h.state[rule.label, "buffer"] = torch.zeros_like(start)
            h.parts[rule.label] = {"x": start, "z": start, "m": torch.zeros_like(start)}
            if rule.name == "mechanic":
                self.parts[rule.label].kept[_place(self.held, h)] = start

    def _act(self, rule: Rule, scope: list[Held], previous: dict[int, Tensor], grads: dict[int, Tensor]) -> None:
        """Let one rule behind the base act on its parameters, and anchors nearer the base follow what it moves."""
        changed = self._changed_updates(rule, previous, grads) if grads else {}
        for i, u in changed.items():
            # what rounding leaves of nothing is nothing, or signs and norms of it would count
            self.held[i].weights = previous[i] + torch.where(u.abs() < 1e-13, 0.0, u)
        moved = [self.held[i] for i in changed if rule.name in AFTER or self._acts_late(rule, self.held[i])]
        begun = [h for h in scope if h.begun]
        if rule.name in ("tail_average", "lawa"):
            self.parts[rule.label].after(rule.label, self.updates, scope)
        elif rule.name == "ema":
            self._average(rule, begun)
        elif rule.name in ("lookahead", "outer") and self.updates % rule.given["k"] == 0:
            moved = begun
            for h in begun:
                _pull(rule, h)
        for h in moved:
            for nearer in self._nearer(rule, h):
                if nearer.name in ANCHORED:
                    h.state[nearer.label, "kept"] = h.parts[nearer.label]["z"] = h.weights

    def _changed_updates(self, rule: Rule, previous: dict[int, Tensor], grads: dict[int, Tensor]) -> dict[int, Tensor]:
        """Return what is added to the weights instead of what was: {} if the rule does not act on that."""
        found = {i: self.held[i].weights - previous[i] for i in grads}
        part = self.parts.get(rule.label)
        if rule.name in ON_UPDATE:
            act = getattr(updates, rule.name)
            return {i: act(previous[i], u, grads[i], lr=self.held[i].lr, **rule.given) for i, u in found.items()}
        if rule.name == "clip_update_norm":
            return dict(zip(found, updates.clip_update_norm(list(found.values()), **rule.given), strict=True))
        for i in found if rule.name == "magma" else ():
            coin = float(self._draw(torch.rand, rule, self.updates - 1, i, ()))
            part.kept[self.updates - 1, i] = float(coin < rule.given["keep"])
        if rule.name in ("mechanic", "magma"):
            before = [previous.get(i, h.weights) for i, h in enumerate(self.held)]
            return part.updates(before, grads, found, self.updates - 1)
        if not isinstance(part, averages.Interpolated | averages.EmaNesterov):
            return {}
        part.open_update(self.updates - 1, {self.held[i].group: self.held[i].lr for i in found})
        for i, u in found.items():
            h, mine = self.held[i], self.held[i].parts[rule.label]
            h.weights = previous[i]
            part.moved(mine, h.weights)  # others may have moved the weights since, or the anchor
            found[i] = part.step(mine, h, u)
        return found

    def _draw(self, draw: Callable[..., Tensor], rule: Rule, t: int, i: int, shape: Sequence[int]) -> Tensor:
        """Draw as the contract of parts says: from one generator for each seed, part, update and parameter."""
        key = f"{rule.given['seed']}/{rule.label}/{t}/{self.held[i].lane[0].replace('*', 'b')}.{i}/1"
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1
        return draw(tuple(shape), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def _average(self, rule: Rule, members: list[Held]) -> None:
        start, every = rule.given["start"], rule.given["every"]
        number = len([t for t in range(start + 1, self.updates + 1) if t % every == 0])
        decay, warmed = rule.given["decay"], (1 + number) / (10 + number)
        d = min(decay, warmed) if rule.given["warmup"] else decay
        for h in members if self.updates % every == 0 else ():
            kept = h.state[rule.label, "kept"]
            h.state[rule.label, "kept"] = h.weights if self.updates <= start else d * kept + (1 - d) * h.weights

    def _nearer(self, rule: Rule, h: Held) -> list[Rule]:
        behind = [*self.lanes[h.lane].behind, *self.behind]
        return behind[: behind.index(rule)]

    def _acts_late(self, rule: Rule, h: Held) -> bool:
        return any(nearer.name in AFTER for nearer in self._nearer(rule, h))


def _part(rule: Rule) -> Any:
    """Return the reference that keeps the state of a rule, if there is one."""
    if rule.name in AVERAGING:
        return AVERAGING[rule.name](**rule.given)
    kind = {**ON_GRADIENTS, "mechanic": gradients.Mechanic, "magma": gradients.Magma}.get(rule.name)
    given = {key: value for key, value in rule.given.items() if key != "seed"}
    return None if kind is None else kind([given] * MOST_PARAMETERS)


def _place(everything: list[Held], held: Held) -> int:
    return next(i for i, h in enumerate(everything) if h is held)


def _pull(rule: Rule, h: Held) -> None:
    """Set the weights to where the slow ones have moved."""
    kept, given = (rule.label, "kept"), rule.given
    if rule.name == "lookahead":
        h.weights = h.state[kept] = h.state[kept] + given["alpha"] * (h.weights - h.state[kept])
        _treat_moments(h, rule)
    else:
        way, momentum = h.state[kept] - h.weights, given["momentum"]
        buffer = h.state[rule.label, "buffer"] = momentum * h.state[rule.label, "buffer"] + way
        h.weights = h.state[kept] = h.state[kept] - given["lr"] * (momentum * buffer + way)


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
