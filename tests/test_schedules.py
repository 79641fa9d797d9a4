"""Every schedule against torch's scheduler of the same rule, and against law 15: what time means."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import metaopt
from metaopt.specs.parsing import parse

STEPS = 300


def from_torch(make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], lr: float = 0.1) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)
    scheduler = make(optimizer)
    values = []
    for _ in range(STEPS):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def schedule(text: str) -> metaopt.Schedule:
    return parse(f"sgd(lr={text})").parts[0].arguments["lr"]


PAIRS = [
    ("constant(0.1)", lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
    ("linear(0.05, 0.1, steps=100)", lambda o: lr_scheduler.LinearLR(o, 0.5, 1.0, 100)),
    ("step_decay(0.1, step_size=30, gamma=0.5)", lambda o: lr_scheduler.StepLR(o, 30, 0.5)),
    ("exponential(0.1, gamma=0.99)", lambda o: lr_scheduler.ExponentialLR(o, 0.99)),
    ("polynomial(0.1, power=2.0, steps=250)", lambda o: lr_scheduler.PolynomialLR(o, 250, 2.0)),
    ("cosine(0.1, end=0.01, steps=300)", lambda o: lr_scheduler.CosineAnnealingLR(o, 300, 0.01)),
    ("cosine_restarts(0.1, first=40)", lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 40)),
    ("cosine_restarts(0.1, first=20, mult=2)", lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 20, 2)),
    ("cyclic(0.01, 0.1, up=30)", lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 30)),
    (
        "cyclic(0.01, 0.1, up=30, down=20, mode='triangular2')",
        lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 30, 20, mode="triangular2"),
    ),
    (
        "cyclic(0.01, 0.1, up=30, mode='exp_range', gamma=0.99)",
        lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 30, mode="exp_range", gamma=0.99),
    ),
    ("one_cycle(0.1, steps=301)", lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=301)),
    (
        "one_cycle(0.1, steps=301, anneal='linear')",
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=301, anneal_strategy="linear"),
    ),
    ("warmup(0.1, 50, start=0.01)", lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 50)),
    (
        "warmup(cosine(0.1, steps=200), 50, start=0.01)",
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 50), lr_scheduler.CosineAnnealingLR(o, 200)], [50]
        ),
    ),
    (
        "sequence(linear(0.02, 0.1, steps=60), 60, exponential(0.1, gamma=0.98), 100, step_decay(0.1, step_size=20))",
        lambda o: lr_scheduler.SequentialLR(
            o,
            [
                lr_scheduler.LinearLR(o, 0.2, 1.0, 60),
                lr_scheduler.ExponentialLR(o, 0.98),
                lr_scheduler.StepLR(o, 20),
            ],
            [60, 160],
        ),
    ),
]

# the rules as optax documents them, v(t) with t the number of updates done
OPTAX: list[tuple[str, str, Callable[[int], float]]] = [
    ("constant_schedule", "constant(0.3)", lambda t: 0.3),
    ("linear_schedule", "linear(0.3, 0.01, steps=200)", lambda t: 0.3 + (0.01 - 0.3) * min(t, 200) / 200),
    (
        "polynomial_schedule",
        "polynomial(0.3, 0.01, power=1.7, steps=200)",
        lambda t: (0.3 - 0.01) * (1 - min(t, 200) / 200) ** 1.7 + 0.01,
    ),
    ("exponential_decay", "exponential(0.3, gamma=0.99)", lambda t: 0.3 * 0.99**t),
    ("exponential_decay, staircase", "step_decay(0.3, step_size=40, gamma=0.5)", lambda t: 0.3 * 0.5 ** (t // 40)),
    (
        "piecewise_constant_schedule",
        "step_decay(0.3, step_size=100, gamma=0.2)",
        lambda t: 0.3 * math.prod(0.2 for boundary in (100, 200) if t >= boundary),
    ),
    (
        "cosine_decay_schedule",
        "cosine(0.3, end=0.03, steps=200)",
        lambda t: 0.3 * (0.9 * 0.5 * (1 + math.cos(math.pi * min(t, 200) / 200)) + 0.1),
    ),
    ("warmup_constant_schedule", "warmup(0.3, 50, start=0.1)", lambda t: 0.1 + (0.3 - 0.1) * min(t, 50) / 50),
    (
        "warmup_cosine_decay_schedule",
        "warmup(cosine(0.3, end=0.03, steps=150), 50, start=0.1)",
        lambda t: (
            0.1 + 0.2 * t / 50 if t < 50 else 0.3 * (0.9 * 0.5 * (1 + math.cos(math.pi * min(t - 50, 150) / 150)) + 0.1)
        ),
    ),
    (
        "join_schedules",
        "sequence(constant(0.1), 20, linear(0.2, 0.1, steps=100), 130, 0.05)",
        lambda t: 0.1 if t < 20 else 0.2 - 0.1 * min(t - 20, 100) / 100 if t < 150 else 0.05,
    ),
    (
        "sgdr_schedule",
        "sequence(warmup(cosine(0.3, steps=80), 20), 100, warmup(cosine(0.2, steps=180), 20))",
        lambda t: (
            (0.3 if t < 100 else 0.2)
            * (
                (t % 100 if t < 100 else t - 100) / 20
                if (t if t < 100 else t - 100) < 20
                else 0.5 * (1 + math.cos(math.pi * ((t - 20) / 80 if t < 100 else (t - 120) / 180)))
            )
        ),
    ),
    # optax counts 100 updates to the peak and 300 to the end, torch and we one less: 0.335 of 301 less one is 100
    (
        "cosine_onecycle_schedule",
        f"one_cycle(0.3, pct_start={101 / 301!r}, div_factor=25.0, final_div_factor=100.0, steps=301)",
        lambda t: (
            0.3 / 25 + (0.3 - 0.3 / 25) * (1 - math.cos(math.pi * t / 100)) / 2
            if t <= 100
            else 0.3 + (0.3 / 2500 - 0.3) * (1 - math.cos(math.pi * (t - 100) / 200)) / 2
        ),
    ),
    (
        "linear_onecycle_schedule",
        f"one_cycle(0.3, pct_start={101 / 301!r}, final_div_factor=100.0, steps=301, anneal='linear')",
        lambda t: 0.3 / 25 + (0.3 - 0.3 / 25) * t / 100 if t <= 100 else 0.3 + (0.3 / 2500 - 0.3) * (t - 100) / 200,
    ),
]


@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")  # torch's SequentialLR uses it itself
@pytest.mark.parametrize(("text", "make"), PAIRS, ids=[text for text, _ in PAIRS])
def test_equals_torch_over_300_steps(
    text: str, make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]
) -> None:
    ours = schedule(text)
    until = 250 if "warmup(cosine" in text else STEPS  # torch's closed cosine rises again after its end
    found = [ours(t) for t in range(until)]
    assert found == pytest.approx(from_torch(make)[:until], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("name", "text", "rule"), OPTAX, ids=[name for name, _, _ in OPTAX])
def test_equals_the_rule_of_optax_over_300_steps(name: str, text: str, rule: Callable[[int], float]) -> None:
    ours = schedule(text)
    assert [ours(t) for t in range(STEPS)] == pytest.approx([rule(t) for t in range(STEPS)], rel=1e-12, abs=1e-12)


def test_noam_peaks_at_the_end_of_its_warm_up() -> None:
    noam = schedule("noam(d_model=512, warmup=4000)")
    values = [noam(t) for t in range(8000)]
    assert values.index(max(values)) == 4000 - 1  # the 4000th update
    assert max(values) == pytest.approx(6.98771242969e-4, rel=1e-11)
    # the paper's rule, whose steps are counted from 1
    paper = [512**-0.5 * min(step**-0.5, step * 4000**-1.5) for step in range(1, 8001)]
    assert values == pytest.approx(paper, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("linear(0.1, 0.0)", 100),
        ("cosine(0.1, steps=0.25)", 25),
        ("wsd(0.1)", 100),
        ("warmup(0.1, 20)", 20),
        ("warmup(cosine(0.1, steps=30), 20)", 50),
        ("warmup(cosine(0.1), 0.2)", 100),
        ("sequence(linear(0.0, 0.1, steps=10), 10, linear(0.1, 0.0, steps=30), 40, 0.05)", 50),
        ("sequence(0.1, 10, 0.2, 0.3, linear(0.2, 0.0, steps=15))", 55),
        ("sequence(0.1, 10, 0.2, 20, cosine(0.2))", 100),
        ("sequence(0.1, 10, 0.2, 20, warmup(0.3, 5))", 35),
    ],
)
def test_a_schedule_reaches_its_last_value_after_its_length(text: str, length: int) -> None:
    ours = schedule(text)
    assert ours.length(100, 100) == length
    values = [ours(t, 100) for t in range(200)]
    assert values[length - 1] != values[length]
    assert set(values[length:]) == {values[length]}


@pytest.mark.parametrize(
    "text",
    ["constant(0.1)", "exponential(0.1, gamma=0.9)", "noam", "cyclic(0.0, 0.1)", "sequence(0.1, 9, 0.2, 9, noam)"],
)
def test_a_schedule_without_an_end_has_no_length(text: str) -> None:
    assert schedule(text.replace("noam", "noam(64)")).length(100, 100) is None


@pytest.mark.parametrize(
    "text",
    [
        "warmup(cosine(0.1), 100)",
        "warmup(0.1, 250)",
        "sequence(0.1, 60, 0.2, 40, cosine(0.1))",
        "sequence(0.1, 60, warmup(cosine(0.1), 10), 10, warmup(0.2, 30))",
        "sequence(warmup(cosine(0.1), 50), 50, 0.1)",
        "wsd(0.1, warmup=60, decay=60)",
    ],
)
def test_what_a_run_ends_before_is_refused(text: str) -> None:
    with pytest.raises(metaopt.HyperparameterError, match=r"begins after|exceed"):
        metaopt.build([torch.nn.Parameter(torch.zeros(1))], f"sgd(lr={text})", total_steps=100)


@pytest.mark.parametrize(
    "text", ["cosine(0.1, steps=250)", "warmup(cosine(0.1, steps=250), 99)", "noam(64, warmup=400)"]
)
def test_a_curve_that_a_run_cuts_short_is_a_choice(text: str) -> None:
    opt = metaopt.build([torch.nn.Parameter(torch.zeros(1))], f"sgd(lr={text})", total_steps=100)
    assert opt.schedules["lr"](50, 100) == opt.schedules["lr"](50, 1000)


@pytest.mark.parametrize("text", ["exponential(1.0, gamma=2.0)", "step_decay(1.0, step_size=1, gamma=2.0)",
                                  "cyclic(0.0, 1.0, mode='exp_range', gamma=2.0)"])  # fmt: skip
def test_a_rate_that_grows_beyond_every_float_is_infinite(text: str) -> None:
    assert schedule(text)(2**20 + 1) == math.inf


@pytest.mark.parametrize("steps", ["0", "-5", "1.0", "2.5", "True", "1e300", "inf", "'all'"])
def test_a_length_that_is_no_number_of_updates_is_refused(steps: str) -> None:
    with pytest.raises(metaopt.HyperparameterError, match="steps"):
        metaopt.build([torch.nn.Parameter(torch.zeros(1))], f"sgd(lr=linear(0.1, 0.0, steps={steps}))", total_steps=100)


def test_wsd_rises_stays_and_falls_as_three_joined_lines() -> None:
    wsd, run = schedule("wsd(0.1, warmup=0.1, decay=60, end=0.01, start=0.02)"), STEPS
    up, down = [0.02 + 0.08 * t / 30 for t in range(30)], [0.1 - 0.09 * t / 60 for t in range(61)]
    assert [wsd(t, run) for t in range(run + 1)] == pytest.approx(up + [0.1] * 210 + down, rel=1e-12)
    assert wsd(10 * run, run) == 0.01
    with pytest.raises(metaopt.HyperparameterError, match="exceed"):
        schedule("wsd(0.1, warmup=0.6, decay=0.6)")(0, run)


def test_inverse_sqrt_is_noam_with_the_peak_given() -> None:
    ours, noam = schedule("inverse_sqrt(0.1, warmup=100)"), schedule("noam(d_model=512, warmup=100)")
    assert [ours(t) for t in range(1, STEPS)] == pytest.approx(
        [0.1 * noam(t - 1) / noam(99) for t in range(1, STEPS)], rel=1e-12
    )


def test_a_warm_up_hands_over_to_the_inner_schedule_s_own_time() -> None:
    warm = schedule("warmup(cosine(0.1), 0.1)")
    inner = schedule("cosine(0.1, steps=90)")
    assert [warm(t, 100) for t in (0, 5, 10)] == pytest.approx([0.0, 0.05, 0.1])
    assert [warm(t, 100) for t in range(10, 120)] == [inner(t - 10) for t in range(10, 120)]


def test_sequence_gives_each_member_its_own_time() -> None:
    joined = schedule("sequence(linear(0.0, 1.0, steps=10), 10, constant(0.5), 5, cosine(1.0))")
    assert joined(5, 115) == pytest.approx(0.5)
    assert [joined(t, 115) for t in (10, 14)] == [0.5, 0.5]
    assert joined(15, 115) == pytest.approx(1.0)
    assert joined(65, 115) == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert joined(500, 115) == pytest.approx(0.0)


@pytest.mark.parametrize("text", ["cosine(0.1)", "linear(0.1, 0.0, steps=0.5)", "warmup(0.1, 0.05)"])
def test_a_length_that_depends_on_the_run_needs_total_steps(text: str) -> None:
    with pytest.raises(metaopt.HyperparameterError, match="total_steps"):
        metaopt.build([torch.nn.Parameter(torch.zeros(1))], f"sgd(lr={text})")


def test_a_fraction_is_rounded_and_at_least_one_update() -> None:
    assert schedule("linear(1.0, 0.0, steps=0.001)")(1, 100) == 0.0
    assert schedule("linear(1.0, 0.0, steps=0.29)")(29, 100) == 0.0


def test_a_schedule_is_written_at_construction_and_after_each_update() -> None:
    x = torch.nn.Parameter(torch.zeros(1))
    opt = metaopt.build(
        [x], "sgd(lr=linear(1.0, 0.0)) | lookahead(k=2, alpha=linear(0.5, 0.8, steps=4))", total_steps=4
    )
    seen = []
    for _ in range(5):
        seen += [opt.param_groups[0]["lr"], opt.param_groups[0]["lookahead.alpha"]]
        x.grad = torch.ones(1)
        opt.step()
    assert seen == pytest.approx([1.0, 0.5, 0.75, 0.575, 0.5, 0.65, 0.25, 0.725, 0.0, 0.8])
    assert str(metaopt.build([x], str(opt.spec), total_steps=4).spec) == str(opt.spec)


def test_a_skipped_step_advances_no_schedule() -> None:
    x = torch.nn.Parameter(torch.zeros(1))
    opt = metaopt.build([x], "sgd(lr=linear(1.0, 0.0, steps=4))")
    opt.step()
    assert (opt.updates, opt.skipped, opt.param_groups[0]["lr"]) == (0, "no gradients", 1.0)


def test_a_foreign_driver_of_a_scheduled_value_is_a_conflict() -> None:
    x = torch.nn.Parameter(torch.zeros(1))
    opt = metaopt.build([x], "sgd(lr=linear(1.0, 0.0, steps=4))")
    scheduler = lr_scheduler.StepLR(opt, 1)
    x.grad = torch.ones(1)
    opt.step()
    scheduler.step()
    with pytest.raises(metaopt.ScheduleConflict, match=r"opt\.scheduler\(\).*opt\.scale_lr\(factor\)"):
        opt.step()
    assert x.item() == -1.0


def test_lr_scale_multiplies_constant_and_scheduled_rates_once() -> None:
    for spec in ("sgd(lr=1.0)", "sgd(lr=constant(1.0))"):
        x, y = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
        opt = metaopt.build([{"params": [x], "lr_scale": 0.1}, {"params": [y]}], spec)
        for _ in range(3):
            assert [group["lr"] for group in opt.param_groups] == pytest.approx([0.1, 1.0])
            assert "lr_scale" not in opt.param_groups[0]
            x.grad = y.grad = torch.ones(1)
            opt.step()


@pytest.mark.parametrize(
    "text", ["adamw(betas=linear(0.1, 0.2, steps=5))", "sgd(lr=0.1) | lookahead(k=linear(1, 5, steps=5))"]
)
def test_pairs_and_integers_take_no_schedule(text: str) -> None:
    with pytest.raises(metaopt.HyperparameterError, match="takes no schedule"):
        metaopt.build([torch.nn.Parameter(torch.zeros(1))], text)


@pytest.mark.parametrize(
    "event",
    [
        lambda opt: opt.reset_state("moments"),
        lambda opt: opt.reset_state("ema"),
        lambda opt: setattr(opt, "updates", opt.updates),
        copy.deepcopy,
    ],
    ids=["moments", "ema", "updates", "copy"],
)
def test_a_rate_that_was_set_by_hand_outlives_what_comes_before_the_next_step(event: Any) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    opt = metaopt.build([p], "adamw(lr=cosine(0.1)) | ema(0.9)", total_steps=10)

    def step(stack: Any) -> None:
        for group in stack.param_groups:
            for each in group["params"]:
                each.grad = torch.ones_like(each)
        stack.step()

    step(opt)
    scheduled = opt.param_groups[0]["lr"]
    opt.param_groups[0]["lr"] = scheduled / 10
    with pytest.warns(metaopt.MetaoptWarning, match="the rest of the schedule is scaled"):
        after = event(opt) or opt
    assert after.param_groups[0]["lr"] == pytest.approx(scheduled / 10)
    step(after)
    assert 0 < after.param_groups[0]["lr"] < scheduled / 10
