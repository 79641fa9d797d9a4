"""The Hugging Face Trainer: training, clipping, resumption, evaluation, and the scheduler that it makes by default."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from clients.training import assert_same, weights
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import metaopt

pytestmark = pytest.mark.slow

SPEC = "clip_grad_norm(0.5) | adamw(lr=warmup(cosine(0.05), 3)) | lookahead(k=3)"
UNSCHEDULED = "adamw(lr=0.05) | lookahead(k=3)"
BATCH = 2


@pytest.fixture(autouse=True)
def nothing_shared_between_tests():
    """Accelerate keeps its state for the life of a process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


def language_model(seed: int = 0) -> GPT2LMHeadModel:
    """Return a transformer of a few hundred parameters, from its configuration alone."""
    torch.manual_seed(seed)
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2, **quiet))


def text(number: int) -> torch.Tensor:
    return torch.randint(0, 11, (6,), generator=torch.Generator().manual_seed(number))


TEXTS = [{"input_ids": text(number), "labels": text(number)} for number in range(24)]


def stack_over(model: nn.Module, spec: str = SPEC) -> metaopt.Stack:
    return metaopt.build(model.named_parameters(), spec, total_steps=12)


def trainer(model: nn.Module, optimizers: tuple[Any, Any], folder: Path, steps: int, **how: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        **{
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "max_grad_norm": 0,
            **how,
        },
    )
    return Trainer(model, arguments, train_dataset=TEXTS, eval_dataset=TEXTS[:2], optimizers=optimizers)


def train(model: nn.Module, opt: torch.optim.Optimizer, first: int, last: int, clip: float = 0.0) -> None:
    for step in range(first, last):
        ids = torch.stack([text(number) for number in range(BATCH * step, BATCH * (step + 1))])
        opt.zero_grad()
        # the Trainer divides by the number of labels
        model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(ids.numel())).loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()


def test_the_trainer_trains_as_a_loop_of_one_s_own(tmp_path: Path) -> None:
    model, twin = language_model(), language_model()
    opt = stack_over(model)
    trainer(model, (opt, opt.scheduler()), tmp_path, 7).train()
    train(twin, stack_over(twin), 0, 7)
    assert_same(weights(model), weights(twin))
    assert opt.updates == 7


def test_without_a_schedule_in_the_stack_the_trainer_s_own_drives_the_rate(tmp_path: Path) -> None:
    model, twin = language_model(), language_model()
    opt, plain = stack_over(model, UNSCHEDULED), stack_over(twin, UNSCHEDULED)
    trainer(model, (opt, None), tmp_path, 8).train()
    decay = torch.optim.lr_scheduler.LambdaLR(plain, lambda t: 1 - t / 8)
    for step in range(8):
        train(twin, plain, step, step + 1)
        decay.step()
    assert_same(weights(model), weights(twin))


@pytest.mark.parametrize("rate", ["cosine(0.05)", "warmup(cosine(0.05), 3)"])
def test_the_trainer_s_own_scheduler_beside_a_schedule_is_refused_with_the_way_out(rate: str, tmp_path: Path) -> None:
    model = language_model()
    opt = stack_over(model, f"adamw(lr={rate}) | lookahead(k=3)")
    with pytest.raises(metaopt.ScheduleConflict, match=r"a Trainer makes one by default.*opt\.scheduler\(\)"):
        trainer(model, (opt, None), tmp_path, 7).train()


def test_max_grad_norm_clips_once_more_before_a_stack_that_clips(tmp_path: Path) -> None:
    model, twin = language_model(), language_model()
    opt = stack_over(model)
    with pytest.warns(metaopt.MetaoptWarning, match="clips them again"):
        trainer(model, (opt, opt.scheduler()), tmp_path, 7, max_grad_norm=0.1).train()
    train(twin, stack_over(twin, SPEC.partition(" | ")[2]), 0, 7, clip=0.1)
    torch.testing.assert_close(weights(model), weights(twin))


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_a_run_resumed_in_mid_cycle_continues_bit_for_bit(precision: dict[str, bool], tmp_path: Path) -> None:
    model, again = language_model(), language_model(seed=1)
    opt, resumed = stack_over(model), stack_over(again)
    how = {"save_strategy": "steps", "save_steps": 4, **precision}
    trainer(model, (opt, opt.scheduler()), tmp_path, 10, **how).train()
    trainer(again, (resumed, resumed.scheduler()), tmp_path / "again", 10, **how).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-4")
    )
    assert_same(weights(again), weights(model))
    assert resumed.updates == 10


def test_what_is_evaluated_and_saved_are_the_fast_weights_and_in_averaged_the_slow_ones(tmp_path: Path) -> None:
    model = language_model()
    opt = stack_over(model, UNSCHEDULED)
    running = trainer(model, (opt, None), tmp_path, 4)
    running.train()
    fast, slow = weights(model), [opt.state[p]["lookahead.slow"].clone() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    for folder, shown, expected in (("fast", contextlib.nullcontext(), fast), ("slow", opt.averaged(), slow)):
        twin = language_model()
        for p, value in zip(twin.parameters(), expected, strict=True):
            p.data.copy_(value)
        with shown:
            loss = running.evaluate()["eval_loss"]
            running.save_model(str(tmp_path / folder))
        assert loss == trainer(twin, (None, None), tmp_path, 1).evaluate()["eval_loss"]
        saved = load_file(tmp_path / folder / "model.safetensors")
        assert_same([saved[name] for name in names], expected)
    assert_same(weights(model), fast)


def test_the_trainer_puts_a_schedule_free_base_into_its_modes(tmp_path: Path) -> None:
    model, twin = language_model(), language_model()
    opt = metaopt.wrap(schedulefree.AdamWScheduleFree(model.parameters(), lr=0.05), "clip_grad_norm(1e9)")
    running = trainer(model, (opt, opt.scheduler()), tmp_path, 5)
    running.train()
    bare = schedulefree.AdamWScheduleFree(twin.parameters(), lr=0.05)
    bare.train()
    train(twin, bare, 0, 5)
    assert_same(weights(model), weights(twin))
    running.evaluate()
    bare.eval()
    assert_same(weights(model), weights(twin))
