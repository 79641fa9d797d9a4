"""Accelerate: prepare, accumulate, clip_grad_norm_, save_state and load_state."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from clients.training import assert_same, batch, loss_of, small_model, train, weights
from safetensors.torch import load_file
from torch import nn

import metaopt

SPEC = "clip_grad_norm(0.5) | adamw(lr=warmup(cosine(0.05), 3)) | lookahead(k=3)"


@pytest.fixture(autouse=True)
def nothing_shared_between_tests():
    """Accelerate keeps its state for the life of a process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


def stack_over(model: nn.Module, spec: str = SPEC) -> metaopt.Stack:
    return metaopt.build(model, spec, total_steps=12)


def accelerated_train(accelerator: Accelerator, model: nn.Module, opt: object, first: int, last: int) -> None:
    for step in range(first, last):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch(step)))
            opt.step()
            opt.zero_grad()


def test_a_prepared_stack_trains_as_a_loop_of_one_s_own() -> None:
    model, twin = small_model(), small_model()
    accelerator = Accelerator(cpu=True)
    opt = stack_over(model)
    prepared_model, prepared = accelerator.prepare(model, opt)
    accelerated_train(accelerator, prepared_model, prepared, 0, 7)
    train(twin, stack_over(twin), 0, 7)
    assert_same(weights(model), weights(twin))
    assert prepared.optimizer is opt
    assert opt.updates == 7


def test_a_prepared_reporting_scheduler_changes_nothing_and_shows_the_rates() -> None:
    model, twin = small_model(), small_model()
    accelerator = Accelerator(cpu=True)
    opt, plain = stack_over(model), stack_over(twin)
    prepared_model, prepared, scheduler = accelerator.prepare(model, opt, opt.scheduler())
    for step in range(7):
        assert scheduler.get_last_lr() == [plain.param_groups[0]["lr"]]
        accelerated_train(accelerator, prepared_model, prepared, step, step + 1)
        scheduler.step()
        train(twin, plain, step, step + 1)
    assert_same(weights(model), weights(twin))


def test_accumulated_batches_are_one_update() -> None:
    model, twin = small_model(), small_model()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    opt, plain = stack_over(model), stack_over(twin)
    accelerated_train(accelerator, *accelerator.prepare(model, opt), 0, 6)
    for step in range(3):
        plain.zero_grad()
        for part in (2 * step, 2 * step + 1):
            (loss_of(twin, batch(part)) / 2).backward()
        plain.step()
    assert_same(weights(model), weights(twin))
    assert opt.updates == 3


def test_clip_grad_norm_clips_for_a_stack_that_does_not() -> None:
    model, twin = small_model(), small_model()
    accelerator = Accelerator(cpu=True)
    prepared_model, prepared = accelerator.prepare(model, stack_over(model, SPEC.partition(" | ")[2]))
    for step in range(7):
        prepared.zero_grad()
        accelerator.backward(loss_of(prepared_model, batch(step)))
        accelerator.clip_grad_norm_(prepared_model.parameters(), 0.5)
        prepared.step()
    train(twin, stack_over(twin), 0, 7)
    torch.testing.assert_close(weights(model), weights(twin))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_saved_state_continues_bit_for_bit(precision: str, tmp_path: Path) -> None:
    model, again = small_model(), small_model(seed=1)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    prepared_model, prepared = accelerator.prepare(model, stack_over(model))
    accelerated_train(accelerator, prepared_model, prepared, 0, 4)
    accelerator.save_state(str(tmp_path))
    accelerated_train(accelerator, prepared_model, prepared, 4, 10)

    resumed = stack_over(again)
    fresh = Accelerator(cpu=True, mixed_precision=precision)
    prepared_again = fresh.prepare(again, resumed)
    fresh.load_state(str(tmp_path))
    assert resumed.updates == 4
    accelerated_train(fresh, *prepared_again, 4, 10)
    assert_same(weights(again), weights(model))
    assert {resumed.state[p]["lookahead.slow"].dtype for p in again.parameters()} == {torch.float32}


def test_the_saved_weights_are_the_fast_ones_and_in_averaged_the_slow_ones(tmp_path: Path) -> None:
    model = small_model()
    accelerator = Accelerator(cpu=True)
    opt = stack_over(model)
    prepared_model, prepared = accelerator.prepare(model, opt)
    accelerated_train(accelerator, prepared_model, prepared, 0, 4)
    accelerator.save_model(prepared_model, str(tmp_path / "fast"))
    with opt.averaged():
        accelerator.save_model(prepared_model, str(tmp_path / "slow"))
    names = [name for name, _ in model.named_parameters()]
    fast, slow = (load_file(tmp_path / kind / "model.safetensors") for kind in ("fast", "slow"))
    assert_same([fast[name] for name in names], weights(model))
    assert_same([slow[name] for name in names], [opt.state[p]["lookahead.slow"] for p in model.parameters()])


def test_a_stack_goes_inside_of_what_accelerate_prepares() -> None:
    model = small_model()
    _, prepared = Accelerator(cpu=True).prepare(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(metaopt.SpecError, match=r"keeps AdamW in \.optimizer.*Put the stack inside"):
        metaopt.wrap(prepared, "lookahead(k=3)")
