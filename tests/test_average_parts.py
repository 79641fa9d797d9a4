"""Parts that average weights, or step from an average, follow their papers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_averages import Ema, EmaNesterov, Interpolated, Lookahead, PlainRun, Rule, Samples, Schedule

import metaopt

SHAPES = ((4, 3), (3,), (2, 2, 2), (), (0,), (2, 0), (5, 1))
GROUPS = [[0, 1, 4, 6], [2, 3, 5]]
BASES: dict[str, dict[str, Any]] = {
    "sgd(lr=0.1)": {"name": "sgd"},
    "sgd(lr=0.1, momentum=0.9)": {"name": "sgd", "momentum": 0.9},
    "adam(lr=0.1)": {"name": "adam"},
    "adamw(lr=0.1, weight_decay=0.1)": {"name": "adamw", "weight_decay": 0.1},
}
RULES: dict[str, Callable[[], Rule]] = {
    "gpa(mu_x=0.9)": lambda: Interpolated(0.7, mu_x=0.9),
    "gpa(mu_x=0.0, mu_y=0.5)": lambda: Interpolated(0.5, mu_x=0.0),
    "gpa": lambda: Interpolated(0.7, mu_x=0.9967),
    "schedule_free": lambda: Interpolated(0.9),
    "schedule_free(1.0, r=2.0, weight_lr_power=0.0)": lambda: Interpolated(1.0, r=2.0, weight_lr_power=0.0),
    "schedule_free(momentum=0.5, r=1.0, weight_decay_at_y=0.1)": lambda: Interpolated(
        0.5, r=1.0, weight_decay_at_y=0.1
    ),
    "ema_nesterov(gamma=0.9)": lambda: EmaNesterov(constant(0.5), 0.9),
    "ema_nesterov(beta=sequence(0.0, 3, 0.5, 4, 1.5, 6, 0.0))": lambda: EmaNesterov(by_parts, 0.99),
    "tail_average": lambda: Samples(1),
    "tail_average(start=4, every=3)": lambda: Samples(3, start=4),
    "lawa(k=1, n=3)": lambda: Samples(1, last=3),
    "lawa(k=2, n=4)": lambda: Samples(2, last=4),
    "ema(0.8)": lambda: Ema(0.8),
    "ema(0.8, start=4)": lambda: Ema(0.8, begins=4),
    "ema(0.8, every=3, device='cpu')": lambda: Ema(0.8, every=3),
    "ema(0.9, warmup=True, start=5, every=3)": lambda: Ema(0.9, warmup=True, begins=5, every=3),
    "ema(0.9, warmup=True, start=2, every=4)": lambda: Ema(0.9, warmup=True, begins=2, every=4),
    "lookahead(k=3)": lambda: Lookahead(3),
}
AVERAGING = [spec for spec in RULES if not spec.startswith("lookahead")]


def constant(value: float) -> Schedule:
    return lambda t: value


def by_parts(t: int) -> float:
    return 0.0 if t < 3 else 0.5 if t < 7 else 1.5 if t < 13 else 0.0


def labelled(spec: str, label: str) -> str:
    return f"{spec[:-1]}, label={label!r})" if spec.endswith(")") else f"{spec}(label={label!r})"


class Pair:
    """A stack and the plain rules of its parts, over equal parameters in two groups with rates of their own."""

    def __init__(self, base: str, *parts: str, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
        self.labels = [f"part{number}" for number in range(len(parts))]
        self.spec = " | ".join([base, *(labelled(part, name) for part, name in zip(parts, self.labels, strict=True))])
        self.params, self.opt = self.build(weights, dtype)
        self.plain = PlainRun(weights, GROUPS, [constant(0.1), constant(0.03)], BASES[base])
        self.plain.parts = {name: RULES[part]() for name, part in zip(self.labels, parts, strict=True)}

    def build(self, weights: list[torch.Tensor], dtype: torch.dtype) -> tuple[list[torch.nn.Parameter], metaopt.Stack]:
        params = [torch.nn.Parameter(w.clone().to(dtype)) for w in weights]
        first, second = ([params[i] for i in group] for group in GROUPS)
        return params, metaopt.build([{"params": first}, {"params": second, "lr": 0.03}], self.spec)

    def gradients(self, number: int, weights: list[torch.Tensor]) -> list[torch.Tensor | None]:
        """Return the noisy gradients of a quadratic; some parameters have none now and then, and one has none early."""
        generator = torch.Generator().manual_seed(1000 + number)
        found: list[torch.Tensor | None] = []
        for i, w in enumerate(weights):
            noise = torch.randn(w.shape, generator=generator, dtype=torch.float64)
            left_out = (number + i) % 4 == 3 or (i in GROUPS[1] and number % 7 == 2) or (i == 1 and number < 6)
            found.append(None if left_out else 0.5 * w + noise)
        return found

    def step(self, number: int) -> None:
        held = [h.weights for h in self.plain.held]
        self.plain.step(self.gradients(number, held))
        self.step_stack(number)

    def step_stack(self, number: int) -> None:
        found = self.gradients(number, [p.detach().double() for p in self.params])
        for p, g in zip(self.params, found, strict=True):
            p.grad = None if g is None else g.to(p.dtype)
        self.opt.step()

    def bits(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.params]

    def resumed(self) -> metaopt.Stack:
        """Return the stack of a new process that loads a checkpoint taken here and now."""
        saved = copy.deepcopy(self.opt.state_dict())
        self.params, opt = self.build([p.detach() for p in self.params], self.params[0].dtype)
        opt.load_state_dict(saved)
        return opt

    def assert_equal(self, where: str) -> None:
        for p, held in zip(self.params, self.plain.held, strict=True):
            assert_close(p.detach(), held.weights, where)
        for label in self.labels:
            if self.averages(label):
                with self.opt.averaged(label):
                    for p, held in zip(self.params, self.plain.held, strict=True):
                        assert_close(p.detach(), self.plain.parts[label].shown(label, held), f"{label} {where}")

    def averages(self, label: str) -> bool:
        return not isinstance(self.plain.parts[label], Lookahead)


def assert_close(found: torch.Tensor, expected: torch.Tensor, where: str = "") -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=lambda text: f"{where}: {text}")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("part", AVERAGING)
def test_weights_and_average_follow_the_paper_at_every_step(base: str, part: str) -> None:
    pair = Pair(base, part)
    for number in range(20):
        pair.step(number)
        pair.assert_equal(f"{pair.spec} after step {number}")


STACKS = [
    ("gpa(mu_x=0.9)", "lookahead(k=3)"),
    ("lookahead(k=3)", "gpa(mu_x=0.9)"),
    ("schedule_free", "lookahead(k=3)"),
    ("lookahead(k=3)", "schedule_free"),
    ("ema_nesterov(gamma=0.9)", "lookahead(k=3)"),
    ("lookahead(k=3)", "ema_nesterov(gamma=0.9)"),
    ("tail_average", "lookahead(k=3)"),
    ("lookahead(k=3)", "tail_average(start=4, every=3)"),
    ("lawa(k=2, n=4)", "lookahead(k=3)"),
    ("lookahead(k=3)", "lawa(k=1, n=3)"),
    ("tail_average", "lawa(k=2, n=4)"),
    ("gpa(mu_x=0.9)", "tail_average(start=4, every=3)"),
    ("ema_nesterov(gamma=0.9)", "lawa(k=1, n=3)", "tail_average"),
]


@pytest.mark.slow
@pytest.mark.parametrize("parts", STACKS, ids=" | ".join)
def test_several_parts_follow_their_papers_together(parts: tuple[str, ...]) -> None:
    for base in ("sgd(lr=0.1, momentum=0.9)", "adam(lr=0.1)"):
        pair = Pair(base, *parts)
        for number in range(20):
            pair.step(number)
            pair.assert_equal(f"{pair.spec} after step {number}")


@pytest.mark.parametrize("parts", [*((part,) for part in AVERAGING), *STACKS], ids=" | ".join)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_run_resumes_bit_for_bit_from_before_within_and_after_an_average(
    parts: tuple[str, ...], dtype: torch.dtype
) -> None:
    whole, cut = (Pair("adam(lr=0.1)", *parts, dtype=dtype) for _ in range(2))
    shown = [label for label in whole.labels if whole.averages(label)]
    for number in range(16):
        whole.step_stack(number)
        cut.step_stack(number)
        if number % 3 == 1:
            before = cut.bits()
            with cut.opt.averaged(shown[number % len(shown)]):
                inside = cut.bits()
                if number % 2:
                    resumed = cut.resumed()
            if number % 2:
                assert_same(cut.bits(), inside, "a checkpoint taken inside averaged() has the average for weights")
                cut.opt = resumed
                cut.opt.zero_grad()
            assert_same(cut.bits(), before, "leaving averaged() gives the weights back")
        elif number % 3 == 2:
            cut.opt = cut.resumed()
        assert_same(cut.bits(), whole.bits(), f"after step {number}")


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], where: str) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), where


@pytest.mark.parametrize("part", AVERAGING)
def test_before_the_first_update_the_average_is_the_weights(part: str) -> None:
    pair = Pair("sgd(lr=0.1)", part)
    before = pair.bits()
    with pair.opt.averaged():
        assert_same(pair.bits(), before, part)


@pytest.mark.parametrize("part", ["tail_average(start=9)", "tail_average(every=9)", "lawa(k=9, n=2)"])
def test_before_the_first_sample_the_average_is_the_weights(part: str) -> None:
    params = [torch.nn.Parameter(torch.ones(3))]
    opt = metaopt.build(params, f"sgd(lr=0.1) | {part}")
    for number in range(1, 11):
        params[0].grad = torch.full((3,), float(number))
        opt.step()
        now = params[0].detach().clone()
        with opt.averaged():
            # the first sample is update 9's or, past start=9, update 10's; lawa's is kept as a difference
            torch.testing.assert_close(params[0], now, rtol=1e-6 if number == 9 else 0.0, atol=0.0)
        if number == 9 and "start" not in part:
            break


def test_without_averaging_gpa_is_its_base() -> None:
    # the paper: with mu_x = 0 the three sequences are one, for any mu_y
    plain, averaged = Pair("adamw(lr=0.1, weight_decay=0.1)"), Pair("adamw(lr=0.1, weight_decay=0.1)", "gpa")
    averaged.opt.param_groups[0]["part0.mu_x"] = averaged.opt.param_groups[1]["part0.mu_x"] = 0.0
    for number in range(20):
        plain.step_stack(number)
        averaged.step_stack(number)
    for p, q in zip(plain.params, averaged.params, strict=True):
        assert_close(q.detach(), p.detach())


def test_without_a_step_ahead_ema_nesterov_is_its_base_bit_for_bit() -> None:
    plain, ahead = Pair("adam(lr=0.1)"), Pair("adam(lr=0.1)", "ema_nesterov(gamma=0.9)")
    for group in ahead.opt.param_groups:
        group["part0.beta"] = 0.0
    for number in range(20):
        plain.step_stack(number)
        ahead.step_stack(number)
    for p, q in zip(plain.params, ahead.params, strict=True):
        assert_close(q.detach(), p.detach())


@pytest.mark.parametrize("part", ["tail_average", "lawa(k=1, n=8)"])
def test_the_mean_of_16_bit_weights_is_rounded_once(part: str) -> None:
    p = torch.nn.Parameter(torch.linspace(-1, 1, 50).bfloat16())
    opt = metaopt.build([p], f"sgd(lr=0.1) | {part}")
    samples = []
    for number in range(8):
        p.grad = p.detach() + 0.1 * number
        opt.step()
        samples.append(p.detach().double())
    with opt.averaged():
        # a sample's difference from the first weights is rounded too
        ulps = 0.51 if part == "tail_average" else 1.0
        error = (p.detach().double() - torch.stack(samples).mean(0)).abs()
        assert (error <= ulps * 2.0**-7 * torch.stack(samples).abs().amax(0)).all()


@pytest.mark.parametrize("part", ["gpa(mu_x=0.9)", "schedule_free", "ema_nesterov(gamma=0.9)"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_go_where_double_ones_go(part: str, dtype: torch.dtype) -> None:
    ends = []
    for precision in (torch.float64, dtype):
        p = torch.nn.Parameter(torch.linspace(-2, 2, 64).to(dtype).to(precision))
        opt = metaopt.build([p], f"sgd(lr=0.2) | {part}")
        for number in range(30):
            p.grad = p.detach() + 0.5 * (number % 5 - 2)
            opt.step()
        kept = [value for key, value in opt.state[p].items() if key.startswith(part.split("(")[0])]
        assert kept[0].dtype == torch.promote_types(precision, torch.float32)
        with opt.averaged():
            ends.append(p.detach().double().clone())
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=5 * torch.finfo(dtype).eps)
