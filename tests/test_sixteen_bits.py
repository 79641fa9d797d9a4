"""Weights and averages of 16 bits that stand still: said once, with what to do."""

import copy

import pytest
import torch
from torch import nn

import metaopt


def run(spec: str, dtype: torch.dtype, *, steps: int = 150, value: float = 1.0) -> torch.Tensor:
    weight = nn.Parameter(torch.full((64,), value, dtype=dtype))
    opt = metaopt.build([("layer.weight", weight)], spec)
    made = torch.Generator().manual_seed(0)
    for _ in range(steps):
        weight.grad = torch.rand(64, generator=made).add_(0.5).to(dtype)
        opt.step()
    return weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", ["adamw(lr=1e-4)", "sgd(lr=1e-5)", "adamw(lr=warmup(constant(1e-5), 5))"])
def test_weights_that_do_not_move_are_named_once(dtype: torch.dtype, spec: str) -> None:
    with pytest.warns(metaopt.MetaoptWarning, match=r"layer\.weight: .* lost to .* 16 bits\. Keep .*autocast") as told:
        weight = run(spec, dtype, steps=350)
    assert len(told) == 1
    assert torch.equal(weight, torch.ones_like(weight))


@pytest.mark.parametrize(
    ("spec", "dtype", "value"),
    [
        ("adamw(lr=1e-4)", torch.float32, 1.0),
        ("adamw(lr=1e-2)", torch.bfloat16, 1.0),
        ("adamw(lr=1e-4)", torch.bfloat16, 0.01),
        ("adamw(lr=0.0)", torch.bfloat16, 1.0),
        ("adamw(lr=1e-2) | ema(decay=0.99, average_dtype='float32')", torch.bfloat16, 1.0),
        ("adamw(lr=1e-2) | lookahead(k=50)", torch.bfloat16, 1.0),
        ("adamw(lr=1e-2) | ema(decay=0.5, start=200)", torch.bfloat16, 1.0),
    ],
)
def test_what_moves_or_need_not_move_is_not_named(spec: str, dtype: torch.dtype, value: float) -> None:
    run(spec, dtype, value=value)


def test_an_average_that_does_not_follow_is_named_with_its_setting() -> None:
    said = r"ema\.average of layer\.weight: .* Give ema average_dtype='float32'"
    with pytest.warns(metaopt.MetaoptWarning, match=said) as told:
        run("adamw(lr=1e-3) | ema(decay=0.9999)", torch.bfloat16, value=0.3)
    assert len(told) == 1


def test_parameters_without_gradients_are_not_named() -> None:
    weight, idle = (nn.Parameter(torch.full((8,), 0.01, dtype=torch.bfloat16)) for _ in range(2))
    opt = metaopt.build([weight, idle], "adamw(lr=1e-3)")
    for step in range(120):
        weight.grad = torch.full_like(weight, 1.0 + step % 3)
        idle.grad = torch.zeros_like(idle) if step % 2 else None
        opt.step()


def test_a_checkpoint_that_is_loaded_meanwhile_is_no_average_that_stands_still() -> None:
    weight = nn.Parameter(torch.full((8,), 0.3, dtype=torch.bfloat16))
    opt = metaopt.build([weight], "adamw(lr=1e-2) | ema(decay=0.5)")
    saved = None
    for step in range(130):
        weight.grad = torch.full_like(weight, 1.0 if step % 2 else -1.5)
        opt.step()
        if step == 50:
            saved = copy.deepcopy(opt.state_dict())
        if step == 90:
            opt.load_state_dict(saved)
