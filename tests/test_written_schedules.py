"""Schedules as people write them: without a warm-up, in a tuple, as a Python function, with milestones."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import metaopt
from metaopt import adamw, cosine, inverse_sqrt, linear, lookahead, noam, sequence, warmup, wsd


def rates(spec: Any, updates: int, key: str = "lr", **settings: Any) -> list[Any]:
    """Return the value of a group entry at each update."""
    x = torch.nn.Parameter(torch.zeros(1))
    opt = metaopt.build([x], spec, **settings)
    found = []
    for _ in range(updates):
        found.append(opt.param_groups[0][key])
        x.grad = torch.ones(1)
        opt.step()
    return found


# ---- lengths of zero


@pytest.mark.parametrize(
    ("without", "same"),
    [
        (warmup(cosine(1e-3), 0), cosine(1e-3)),
        (warmup(cosine(1e-3), 0.0), cosine(1e-3)),
        (warmup(1e-3, 0), 1e-3),
        (wsd(1e-3, warmup=0, decay=0.5), sequence(1e-3, 0.5, linear(1e-3, 0.0))),
        (wsd(1e-3, warmup=0, decay=0), 1e-3),
        (wsd(1e-3, warmup=4, decay=0), warmup(1e-3, 4)),
        (sequence(1e-4, 0, cosine(1e-3)), cosine(1e-3)),
        (sequence(1e-4, 4, 1e-5, 0, 1e-3), sequence(1e-4, 4, 1e-3)),
    ],
)
def test_a_part_of_a_schedule_may_have_no_length(without: Any, same: Any) -> None:
    found, expected = (rates(adamw(lr=s), 12, total_steps=10) for s in (without, same))
    assert found == pytest.approx(expected, rel=1e-12)


def test_rates_that_fall_as_a_square_root_may_begin_at_the_peak() -> None:
    expected = [0.1 / math.sqrt(max(t, 1)) for t in range(8)]
    assert rates(adamw(lr=inverse_sqrt(0.1, warmup=0)), 8) == pytest.approx(expected)
    assert rates(adamw(lr=noam(512, warmup=0)), 8) == pytest.approx([(512 * (t + 1)) ** -0.5 for t in range(8)])


@pytest.mark.parametrize("steps", [-1, 1.5, True, None])
def test_a_warm_up_of_no_number_of_updates_is_still_refused(steps: Any) -> None:
    with pytest.raises(metaopt.HyperparameterError, match="steps"):
        metaopt.build([torch.nn.Parameter(torch.zeros(1))], adamw(lr=warmup(0.1, steps)), total_steps=10)


# ---- milestones


def test_milestones_are_those_of_torch() -> None:
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(opt, [3, 7, 7, 12], gamma=0.5)
    expected = []
    for _ in range(16):
        expected.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    assert rates("sgd(lr=multi_step(0.1, (12, 3, 7, 7), gamma=0.5))", 16) == pytest.approx(expected)


def test_milestones_may_be_fractions_of_the_run() -> None:
    found = rates("sgd(lr=multi_step(1.0, [0.5, 0.75]))", 9, total_steps=8)
    assert found == pytest.approx([1.0] * 4 + [0.1] * 2 + [0.01] * 3)
    with pytest.raises(metaopt.HyperparameterError, match="total_steps"):
        rates("sgd(lr=multi_step(1.0, (0.5,)))", 1)
    with pytest.raises(metaopt.HyperparameterError, match="milestones"):
        rates("sgd(lr=multi_step(1.0, 30))", 1)


# ---- in a tuple


def test_a_member_of_a_tuple_may_have_a_schedule() -> None:
    text = "adamw(betas=(linear(0.95, 0.85), 0.999))"
    for spec in (text, adamw(betas=(linear(0.95, 0.85), 0.999)), adamw(betas=[linear(0.95, 0.85), 0.999])):
        found = rates(spec, 6, "betas", total_steps=5)
        assert [beta for beta, _ in found] == pytest.approx([0.95, 0.93, 0.91, 0.89, 0.87, 0.85])
        assert all(type(betas) is tuple and betas[1] == 0.999 for betas in found)
    opt = metaopt.build([torch.nn.Parameter(torch.zeros(1))], text, total_steps=5)
    assert str(opt.spec) == "adamw(betas=(linear(start=0.95, end=0.85), 0.999))"
    assert str(metaopt.build([torch.nn.Parameter(torch.zeros(1))], str(opt.spec), total_steps=5).spec) == str(opt.spec)
    assert "betas" in repr(opt)


def test_the_numbers_are_those_of_a_loop_that_sets_betas_by_hand() -> None:
    x, y = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    bare = torch.optim.AdamW([y], lr=0.1, fused=True)
    opt = metaopt.build([x], "adamw(lr=0.1, betas=(linear(0.95, 0.85), 0.999)) | lookahead(k=100)", total_steps=6)
    saved = None
    for t in range(6):
        bare.param_groups[0]["betas"] = (0.95 + (0.85 - 0.95) * t / 6, 0.999)
        x.grad = y.grad = torch.full((3,), 0.1 * (t - 2))
        opt.step()
        bare.step()
        if t == 2:
            saved = opt.state_dict()
    assert torch.equal(x, y)
    again = metaopt.build([torch.nn.Parameter(torch.ones(3))], str(opt.spec), total_steps=6)
    again.load_state_dict(saved)
    assert again.param_groups[0]["betas"] == pytest.approx((0.9, 0.999))
    metaopt.explain(opt)


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        ("adamw(betas=linear(0.1, 0.2, steps=5))", r"betas takes no schedule as a whole: give a tuple"),
        ("sgd(lr=(linear(0.1, 0.2, steps=5), 0.1))", "lr takes no schedule"),
        ("adamw(betas=(linear(0.1, 0.2, steps=5), 'a'))", "betas"),
        ("adamw(betas=(linear(0.1, 2.0, steps=5), linear(1.0, 0.9, steps=5)))", "[Ii]nvalid beta"),
        ("adamw(betas=(linear, 0.9))", "brackets"),
    ],
)
def test_what_no_schedule_can_drive_says_so(stack: str, message: str) -> None:
    with pytest.raises(metaopt.MetaoptError, match=message):
        metaopt.build([torch.nn.Parameter(torch.zeros(1))], stack)


# ---- Python functions


def rule(t: int) -> float:
    return 1e-3 / (1 + t)


class Settings:
    def rate(self, t: int) -> float:
        return rule(t)


@pytest.mark.parametrize("function", [rule, lambda t: rule(t), functools.partial(rule), Settings().rate])
def test_a_function_of_the_number_of_updates_is_a_schedule(function: Callable[[int], float]) -> None:
    expected = [rule(t) for t in range(5)]
    assert rates(adamw(lr=function), 5) == expected
    assert [b for b, _ in rates(adamw(betas=(function, 0.9)), 5, "betas")] == expected
    assert rates(adamw | lookahead(alpha=lambda t: 0.5 + function(t)), 5, "lookahead.alpha")[1] == 0.5 + expected[1]
    assert rates(adamw(lr=warmup(function, 2)), 5)[2:] == expected[:3]


def test_a_function_may_return_what_counts_as_a_number() -> None:
    for number in (1, torch.tensor(1.0), pytest.importorskip("numpy").float32(1.0)):
        assert rates(adamw(lr=lambda t, number=number: number), 2) == [1.0, 1.0]
    for wrong in (None, "1", True, torch.ones(2)):
        with pytest.raises(metaopt.HyperparameterError, match=r"must return a number, got .* after 0 updates"):
            rates(adamw(lr=lambda t, wrong=wrong: wrong), 1)


def test_a_function_has_no_text_and_says_so() -> None:
    opt = metaopt.build([torch.nn.Parameter(torch.zeros(1))], adamw(lr=rule), log_every=1)
    with pytest.raises(metaopt.SpecError, match=r"adamw: lr: a Python function has no text.*metaopt\.Schedule"):
        str(opt.spec)
    with pytest.raises(metaopt.SpecError, match="a Python function has no text"):
        str(adamw(lr=warmup(rule, 2)))
    assert "function rule" in repr(opt)
    # a checkpoint holds no schedule: it loads as ever
    again = metaopt.build([torch.nn.Parameter(torch.zeros(1))], adamw(lr=rule))
    again.load_state_dict(opt.state_dict())


def test_a_part_without_its_brackets_is_not_taken_for_a_function() -> None:
    for make in (lambda: adamw(lr=cosine), lambda: adamw(betas=(cosine, 0.9)), lambda: adamw | lookahead(alpha=adamw)):
        with pytest.raises(metaopt.SpecError, match="brackets"):
            make()
    with pytest.raises(metaopt.HyperparameterError, match=r"warmup: cosine.* must be a schedule or a number"):
        metaopt.build([torch.nn.Parameter(torch.zeros(1))], adamw(lr=warmup(cosine, 2)))
    with pytest.raises(metaopt.HyperparameterError, match="k must be int"):
        lookahead(k=lambda t: 5)
