"""torch.amp.GradScaler over a stack: a step with infinite gradients changes nothing, and the run recovers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_runs import assert_same, assert_same_weights, everything, loss_of, small_model, train

import metaopt

WRAPPERS = "clip_grad_norm(0.5) | lookahead(k=2) | ema(0.9)"
Make = Callable[[torch.nn.Module], metaopt.Stack]
MAKES: dict[str, Make] = {
    "fused": lambda m: metaopt.build(m, "clip_grad_norm(0.5) | adamw(lr=0.01) | lookahead(k=2) | ema(0.9)"),
    "fused, scheduled": lambda m: metaopt.build(m, "sgd(lr=cosine(0.1), momentum=0.9) | outer(k=2)", total_steps=30),
    "single tensor": lambda m: metaopt.wrap(torch.optim.AdamW(m.parameters(), lr=0.01), WRAPPERS),
    "multi tensor": lambda m: metaopt.wrap(torch.optim.SGD(m.parameters(), lr=0.1, foreach=True), WRAPPERS),
    "accumulating": lambda m: metaopt.build(m, "accumulate(2) | adamw(lr=0.01) | lookahead(k=2)"),
    "reset": lambda m: metaopt.build(m, "adagrad(lr=0.1) | lookahead(k=2, pullback_momentum='reset')"),
}
each_stack = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in MAKES.items()])


def scaled_step(scaler: torch.amp.GradScaler, model: Any, opt: Any, step: int, factor: float = 1.0) -> None:
    opt.zero_grad()
    scaler.scale(loss_of(model, step) * factor).backward()
    scaler.step(opt)
    scaler.update()


@each_stack
@pytest.mark.parametrize("at", [0, 1, 2, 5])
def test_an_infinite_step_changes_nothing_and_the_run_goes_on_as_if_it_had_not_been(make: Make, at: int) -> None:
    model, twin = small_model(), small_model()
    opt, plain = make(model), make(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(9):
        if step == at:
            before = everything(model, opt)
            scaled_step(scaler, model, opt, step, factor=torch.inf)
            assert_same(everything(model, opt), before)
            assert scaler.get_scale() == 512.0
        scaled_step(scaler, model, opt, step)
    train(twin, plain, range(9))
    # the scale is a power of two: scaling and unscaling round nothing
    assert opt.updates == plain.updates > 0
    assert_same_weights(model, twin)


@each_stack
def test_the_scaler_unscales_and_the_stack_leaves_the_inf_check_to_it(make: Make) -> None:
    model = small_model()
    opt = make(model)
    copies = [opt, copy.deepcopy(opt)]
    fresh = make(small_model())
    fresh.load_state_dict(opt.state_dict())
    for each in (*copies, fresh):
        assert not hasattr(each, "_step_supports_amp_scaling")
        assert not hasattr(each, "grad_scale")
        assert not hasattr(each, "found_inf")


def test_clipping_by_hand_between_unscale_and_step_is_the_stack_s_own_clipping() -> None:
    model, twin = small_model(), small_model()
    by_hand = metaopt.build(model, "adamw(lr=0.01) | lookahead(k=2)")
    built_in = metaopt.build(twin, "clip_grad_norm(0.05) | adamw(lr=0.01) | lookahead(k=2)")
    scalers = [torch.amp.GradScaler("cpu", init_scale=4096.0) for _ in range(2)]
    for step in range(6):
        by_hand.zero_grad()
        scalers[0].scale(loss_of(model, step)).backward()
        scalers[0].unscale_(by_hand)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        assert norm > 0.05
        scalers[0].step(by_hand)
        scalers[0].update()
        scaled_step(scalers[1], twin, built_in, step)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_half_precision_gradients_under_autocast_train_as_without_a_stack() -> None:
    model, twin = small_model(), small_model()
    opt = metaopt.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), "lookahead(k=2, alpha=1.0)")
    bare = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for m, o in ((model, opt), (twin, bare)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
        for step in range(12):
            o.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_of(m, step)
            scaler.scale(loss).backward()
            scaler.step(o)
            scaler.update()
    assert_same_weights(model, twin)
