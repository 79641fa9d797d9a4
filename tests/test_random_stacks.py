"""Stacks of any make-up, trained with uneven gradients and interrupted in any way, follow the rules of their parts."""

import copy
import pickle
import random

import pytest
import torch
from plain_stack import SHOWN, Held, Lane, PlainStack, Rule

import metaopt
from metaopt.engine.views import blocks as engine_blocks

pytestmark = pytest.mark.slow

SHAPES = ((4, 3), (3,), (2, 2, 2), (), (0,), (2, 0), (5, 1))
BEFORE = {
    "clip_grad_norm": {"max_norm": [0.3, 5.0]},
    "clip_grad_value": {"clip_value": [0.3, 2.0]},
    "centralize": {},
    "adaptive_grad_clip": {"clipping": [0.05, 1.0]},
    "l2": {"weight_decay": [0.1]},
    "decay": {"weight_decay": [0.2]},
    "grokfast": {"alpha": [0.8, 0.98], "lamb": [0.5, 2.0]},
    "mars": {"gamma": [0.025, 0.3], "beta1": [0.9]},
    "orthograd": {},
    "gradient_noise": {"eta": [0.01, 0.3], "gamma": [0.55], "seed": [0, 7]},
    "zclip": {"alpha": [0.9], "z_thresh": [0.5, 1.0], "warmup": [2, 3], "mode": ["reciprocal", "mean", "max"]},
}
BEHIND = {
    "lookahead": {"k": [1, 2, 3], "alpha": [0.5, 0.8]},
    "outer": {"k": [1, 2, 3], "lr": [0.7, 1.2], "momentum": [0.0, 0.6], "device": [None, "cpu"]},
    "ema": {"decay": [0.9], "warmup": [False, True], "start": [0, 4], "every": [1, 3], "device": [None, "cpu"]},
    "cautious": {},
    "cautious_decay": {"weight_decay": [0.1, 1.0]},
    "hyperball": {},
    "update_floor": {"floor": [0.35, 2.0], "rows": [False, True]},
    "radial_brake": {"outward": [0.1, 0.5], "inward": [0.7, 1.0]},
    "trust_ratio": {"trust_coefficient": [1.0, 0.1], "eps": [0.0, 0.1], "max_ratio": [1.0, 5.0]},
    "clip_update_norm": {"max_norm": [0.1, 1.0]},
    "clip_update_rms": {"max_rms": [0.3, 1.0]},
    "gpa": {"mu_x": [0.9, 0.5], "mu_y": [0.7, 0.9]},
    "schedule_free": {"momentum": [0.9, 0.6], "r": [0.0, 1.0], "weight_decay_at_y": [0.0, 0.1]},
    "ema_nesterov": {"beta": [0.5, 1.0], "gamma": [0.9, 0.5]},
    "tail_average": {"start": [0, 4], "every": [1, 3]},
    "lawa": {"k": [1, 2], "n": [2, 3]},
    "plateau": {"metric": ["loss"], "factor": [0.5], "patience": [0, 1], "cooldown": [0, 1], "min_lr": [0.0, 0.02]},
    "mechanic": {"s_init": [0.1, 0.5], "num_betas": [2, 6], "weight_decay": [0.0, 0.01]},
    "magma": {"keep": [0.5, 0.9], "tau": [2.0], "seed": [0, 7]},
}
# rules that give an update a size of their own, whatever was left of it
SIZING = ("hyperball", "trust_ratio", "update_floor")
BASES = [
    Rule("sgd", "sgd", {"lr": 0.1}),
    Rule("sgd", "sgd", {"lr": 0.1, "momentum": 0.9}),
    Rule("adam", "adam", {"lr": 0.1}),
    Rule("adamw", "adamw", {"lr": 0.05, "weight_decay": 0.1}),
    Rule("adagrad", "adagrad", {"lr": 0.1}),
]
WAYS = ["none"] * 4 + [
    "checkpoint",
    "copy",
    "pickle",
    "averaged",
    "checkpoint inside averaged",
    "add",
    "reset",
    "split",
]


class Trial:
    """A random stack beside its rules, with the parameters of both."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.seed, self.taken = seed, 0
        choice = self.random.choice
        before = self._rules(BEFORE, choice([0, 1, 2]))
        if choice([0, 0, 1]):
            where = self.random.randint(0, len(before))
            before.insert(where, Rule("accumulate", "accumulate", {"steps": choice([2, 3])}))
        if choice([0, 0, 1]):
            spikes = Rule("skip_spikes", "skip_spikes", {"sigma": choice([0.5, 2.0]), "window": choice([2, 5])})
            before.insert(self.random.randint(0, len(before)), spikes)
        before[:0] = [Rule("sam", "sam", {"rho": 0.1})] if choice([0, 0, 1]) else []
        self.parted = choice([False, True])
        names = ["a.*", "*"] if self.parted else ["*"]
        lanes = {name: self._lane() for name in names}
        behind = self._rules(BEHIND, choice([0, 1])) if self.parted else lanes["*"].behind
        if any(rule.name == "mechanic" for lane in lanes.values() for rule in lane.behind) and self.parted:
            behind = [rule for rule in behind if rule.name not in SIZING]
        if not self.parted:
            later = {choice([2, 3, 6]): choice(BASES), 7: choice(BASES)} if choice([0, 0, 1]) else {}
            lanes["*"] = Lane([], lanes["*"].base, [], later)
        middle = f"partition({{{', '.join(f'{n!r}: {lane}' for n, lane in lanes.items())}}})" if self.parted else None
        parts = [*map(str, before), middle or str(lanes["*"]), *map(str, behind)]
        if choice([0, 0, 1]):  # what only looks may be written anywhere, and no rule follows it
            looks = ("alignment=True", "moments=True, sign_agreement=True", "histograms=True", "noise_scale=True")
            parts.insert(self.random.randint(0, len(parts)), f"monitor({choice(looks)})")
        self.spec = " | ".join(parts)
        self.rules = PlainStack(before, lanes, behind)
        self.groups: list[list[int]] = []
        self.built = self.numbers = 0
        for name in names:
            self.numbers += 1
            self.groups.append([self._new(name) for _ in range(choice([1, 2, 3]))])
        self.built = len(self.groups)
        self.params, self.opt = self.build([h.weights for h in self.rules.held])

    def _rules(self, table: dict[str, dict[str, list]], number: int) -> list[Rule]:
        found = []
        for name in self.random.choices(list(table), k=number):
            self.taken += 1
            given = {key: self.random.choice(values) for key, values in table[name].items()}
            found.append(Rule(name, f"{name}_{self.taken}", given))
        return found

    def _lane(self) -> Lane:
        behind = self._rules(BEHIND, self.random.choice([0, 1, 2, 3]))
        tuner = next((n for n, rule in enumerate(behind) if rule.name == "mechanic"), len(behind))
        # the eps of mechanic moves by a billionth what the base leaves in place: made large, that is beyond comparison
        behind = [rule for n, rule in enumerate(behind) if n < tuner or rule.name not in SIZING]
        first = next((rule for rule in behind if rule.name == "lookahead"), None)
        if first is not None:  # the innermost alone may act on moments
            first.given["pullback_momentum"] = self.random.choice(["none", "reset", "pullback"])
        return Lane(self._rules(BEFORE, self.random.choice([0, 1])), self.random.choice(BASES), behind)

    def _new(self, lane: str) -> int:
        generator = torch.Generator().manual_seed(100 * self.seed + len(self.rules.held))
        weights = torch.randn(self.random.choice(SHAPES), generator=generator, dtype=torch.float64)
        self.rules.add(Held(weights, lane, self.rules.lanes[lane].base.given["lr"], self.numbers))
        return len(self.rules.held) - 1

    def build(self, weights: list[torch.Tensor]) -> tuple[list[torch.nn.Parameter], metaopt.Stack]:
        """Return parameters with these weights, and a stack over them in the groups as they are now."""
        params = [torch.nn.Parameter(w.clone()) for w in weights]
        groups = [{"params": [self._named(i, params[i]) for i in group]} for group in self.groups]
        opt = metaopt.build(groups[: self.built], self.spec, log_every=2)
        for group in groups[self.built :]:
            opt.add_param_group(group)
        return params, opt

    def _named(self, i: int, p: torch.nn.Parameter) -> tuple[str, torch.nn.Parameter]:
        return f"{'a' if self.rules.held[i].lane == 'a.*' else 'b'}.{i}", p

    def interrupt(self, way: str) -> None:
        """Do something to the stack that must not change where training goes, or that the rules can follow."""
        weights = [p.detach() for p in self.params]
        if way == "copy":
            self.params, self.opt = copy.deepcopy((self.params, self.opt))
        elif way == "pickle":
            self.params, self.opt = pickle.loads(pickle.dumps((self.params, self.opt)))
        elif way == "checkpoint":
            self._resume(weights)
        elif way.endswith("averaged") and self._averages():
            label = self.random.choice(self._averages())
            with self.opt.averaged(label):
                self._assert_shown(label)
                if way == "checkpoint inside averaged":
                    self._resume([p.detach().clone() for p in self.params])
        elif way == "add":
            lane = self.random.choice(list(self.rules.lanes))
            self.numbers += 1
            self.groups.append([self._new(lane)])
            self.params.append(torch.nn.Parameter(self.rules.held[-1].weights.clone()))
            self.opt.add_param_group({"params": [self._named(len(self.params) - 1, self.params[-1])]})
        elif way == "reset":
            self.opt.reset_state("moments")
            self.rules.reset_moments()
        elif way == "split" and not self.parted and len(self.groups[0]) > 1:
            entry, *others = self.opt.param_groups
            parts, lists = (slice(1), slice(1, None)), ("params", "param_names")
            halves = [{**entry, **{key: entry[key][part] for key in lists}} for part in parts]
            self.opt.param_groups = [*halves, *others]
            self.groups[:1] = [self.groups[0][:1], self.groups[0][1:]]
            self.built += 1
            self.numbers += 1
            self.rules.split([self.rules.held[i] for i in self.groups[1]], self.numbers)

    def _resume(self, weights: list[torch.Tensor]) -> None:
        saved = copy.deepcopy(self.opt.state_dict())
        self.params, resumed = self.build(weights)
        resumed.load_state_dict(saved)
        self.opt = resumed

    def _averages(self) -> list[str]:
        rules = [*self.rules.behind, *(rule for lane in self.rules.lanes.values() for rule in lane.behind)]
        return [rule.label for rule in rules if rule.name in SHOWN]

    def _assert_shown(self, label: str) -> None:
        for p, held in zip(self.params, self.rules.held, strict=True):
            torch.testing.assert_close(p.detach(), self.rules.shown(label, held), rtol=1e-8, atol=1e-10)

    def step(self, number: int) -> None:
        if self.random.random() < 0.5:
            value = self.random.choice([1.0, 1.0, 0.9, 0.8])
            self.opt.record(loss=value)
            self.rules.record(value)
        present = [self.random.random() < 0.5 for _ in self.params]
        size = self.random.choice([0.1, 1.0, 10.0])

        def gradient(i: int, w: torch.Tensor) -> torch.Tensor:
            generator = torch.Generator().manual_seed(10_000 * self.seed + 50 * number + i)
            return size * (0.7 * w + torch.randn(w.shape, generator=generator, dtype=torch.float64))

        def closure() -> torch.Tensor:
            for i, p in enumerate(self.params):
                p.grad = gradient(i, p.detach()) if present[i] else None
            return torch.zeros(())

        self.opt.zero_grad(set_to_none=self.random.choice([True, False]))
        self.opt.step(closure)
        self.rules.step(gradient, present)
        assert self.opt.updates == self.rules.updates
        for p, held in zip(self.params, self.rules.held, strict=True):
            torch.testing.assert_close(p.detach(), held.weights, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("seed", range(200))
def test_a_random_stack_follows_the_rules_whatever_happens_to_it(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(seed)
    monkeypatch.setattr(engine_blocks, "CPU_BLOCK", trial.random.choice([1 << 19, 2, 5]))
    done = []
    for number in range(12):
        done.append(trial.random.choice(WAYS))
        try:
            trial.interrupt(done[-1])
            trial.step(number)
        except Exception as error:
            raise AssertionError(f"{trial.spec}\nafter {', '.join(done)}") from error
