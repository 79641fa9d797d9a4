"""`skip_spikes` makes no update from a gradient that is far larger than is usual in this run."""

import copy
import math

import pytest
import torch
from reference_gradients import SkipSpikes

import metaopt

SIZES = [1.0, 1.2, 0.9, 1.1, 50.0, 1.0, 1.05, 7.0, 0.95, 1.1, 1.0, 1.3, 200.0, 200.0, 1.0, 0.9]


def build(spec: str, dtype: torch.dtype = torch.float64) -> tuple[torch.nn.Parameter, metaopt.Stack]:
    x = torch.nn.Parameter(torch.zeros(4, dtype=dtype))
    return x, metaopt.build([x], spec)


def step(x: torch.nn.Parameter, opt: metaopt.Stack, size: float) -> bool:
    """Make a step with a gradient of this norm; return whether the update was skipped."""
    x.grad = torch.full_like(x, size / 2)
    opt.step()
    return opt.skipped is not None


@pytest.mark.parametrize(("sigma", "window"), [(6.0, 4), (2.0, 6), (1.0, 3)])
def test_updates_are_skipped_as_the_rule_says(sigma: float, window: int) -> None:
    x, opt = build(f"skip_spikes(sigma={sigma}, window={window}) | sgd(lr=1.0)")
    rule = SkipSpikes([{"sigma": sigma, "window": window}])
    sum_of_used, skipped = 0.0, []
    for number, size in enumerate(SIZES):
        expected = rule.is_spike({0: torch.tensor([size], dtype=torch.float64)})
        assert step(x, opt, size) == expected, number
        skipped += [size] if expected else []
        sum_of_used += 0.0 if expected else size
        torch.testing.assert_close(x.detach(), torch.full_like(x, -sum_of_used / 2))
        assert x.grad is None if expected else x.grad is not None
    assert 50.0 in skipped and opt.param_groups[0]["skip_spikes.spikes"] == len(skipped) == len(SIZES) - opt.updates


def test_a_lasting_change_of_size_is_soon_no_spike() -> None:
    x, opt = build("skip_spikes(window=8) | sgd(lr=1.0)")
    for number in range(20):
        assert not step(x, opt, 1.0 + 0.01 * (number % 3))
    later = [step(x, opt, 1000.0 + number % 3) for number in range(60)]
    assert later[0] and not any(later[40:])


@pytest.mark.parametrize("size", [1.0, 0.0, 1e-30, 1e30])
def test_equal_gradients_are_no_spikes(size: float) -> None:
    x, opt = build("skip_spikes(sigma=0.5, window=8) | adam(lr=0.1)")
    assert not any(step(x, opt, size) for _ in range(30))


def test_what_is_not_finite_is_left_to_others_and_not_remembered() -> None:
    x, opt = build("skip_spikes(window=4) | skip_nonfinite(3) | sgd(lr=1.0)")
    for size in [1.0, math.nan, 1.1, math.inf, 0.9, math.nan, 1.0]:
        step(x, opt, size)
        assert (opt.skipped == "gradients that are not finite") == (not math.isfinite(size))
    assert step(x, opt, 100.0) and opt.skipped == "a spike of the gradient norm"
    assert torch.isfinite(opt.param_groups[0]["skip_spikes.norms_seen"]).all()


def test_behind_accumulate_the_norm_is_that_of_the_whole_window() -> None:
    x, opt = build("accumulate(2) | skip_spikes(window=4) | sgd(lr=1.0)")
    for size in [1.0, 1.0, 1.1, 1.1, 0.9, 0.9]:
        step(x, opt, size)
    before = x.detach().clone()
    assert step(x, opt, 1.0) and step(x, opt, 500.0) and opt.skipped == "a spike of the gradient norm"
    assert torch.equal(x, before) and opt.updates == 3
    assert step(x, opt, 1.0) and not step(x, opt, 1.0)
    torch.testing.assert_close(x.detach(), before - 0.5)


def test_a_resumed_run_skips_the_same_updates() -> None:
    spec = "skip_spikes(sigma=2.0, window=6) | adam(lr=0.1)"
    x, opt = build(spec)
    for size in SIZES[:7]:
        step(x, opt, size)
    y, later = build(spec)
    y.data.copy_(x.data)
    later.load_state_dict(copy.deepcopy(opt.state_dict()))
    for size in SIZES[7:]:
        assert step(x, opt, size) == step(y, later, size)
        assert torch.equal(x, y)


def test_the_norm_is_over_all_groups() -> None:
    x, y = (torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    opt = metaopt.build([{"params": [x]}, {"params": [y]}], "skip_spikes(window=4) | sgd(lr=1.0)")
    for size in [1.0, 1.1, 1.0, 90.0]:
        x.grad, y.grad = torch.tensor([1.0], dtype=torch.float64), torch.tensor([size], dtype=torch.float64)
        opt.step()
    assert opt.skipped == "a spike of the gradient norm" and x.grad is None and float(x.detach()) == -3.0
