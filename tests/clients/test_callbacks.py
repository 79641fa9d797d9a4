"""Callbacks that evaluate, keep the best and export by an average, in the real trainers."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from clients.training import assert_same, batch, loss_of, small_model, weights
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import metaopt
from metaopt.callbacks.lightning import EvaluateAverage as LightningAverage
from metaopt.callbacks.transformers import EvaluateAverage as TrainerAverage

SPEC = "adamw(lr=0.05) | lookahead(k=4) | ema(decay=0.8)"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*srun.*command is available.*"),
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable.*"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
]


@pytest.fixture(autouse=True)
def nothing_shared_between_tests():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


def by_hand(steps: int) -> dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Return weights and averages after each update of a loop of one's own."""
    model = small_model()
    opt = metaopt.build(model, SPEC)
    found = {}
    for step in range(steps):
        opt.zero_grad()
        loss_of(model, batch(step)).backward()
        opt.step()
        found[step + 1] = weights(model), weights(opt.averaged_module())
    return found


def validation_loss(values: list[torch.Tensor]) -> float:
    model = small_model()
    for p, value in zip(model.parameters(), values, strict=True):
        p.data.copy_(value)
    return loss_of(model, batch(99)).item()


# ---- Lightning


class Program(lightning.LightningModule):
    def __init__(self, spec: str = SPEC) -> None:
        super().__init__()
        self.model, self.spec = small_model(), spec
        self.losses: list[float] = []

    def training_step(self, step: torch.Tensor, _: int) -> torch.Tensor:
        return loss_of(self.model, batch(self.global_step))

    def validation_step(self, step: torch.Tensor, _: int) -> None:
        loss = loss_of(self.model, batch(99))
        self.losses.append(loss.item())
        self.log("val_loss", loss)

    def configure_optimizers(self) -> Any:
        return metaopt.build(self.model, self.spec)


def fit(program: Program, folder: Path, steps: int, *callbacks: Any, checkpoint: Any = None) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        default_root_dir=folder,
        plugins=[LightningEnvironment()],
        val_check_interval=2,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        **quiet,
    )
    rows = torch.utils.data.DataLoader(torch.arange(12), batch_size=None)
    one = torch.utils.data.DataLoader(torch.arange(1), batch_size=None)
    trainer.fit(program, rows, one, ckpt_path=checkpoint)
    return trainer


def test_lightning_validates_by_the_average_and_ends_with_it(tmp_path: Path) -> None:
    program, expected = Program(), by_hand(6)
    fit(program, tmp_path, 6, LightningAverage())
    assert program.losses == [validation_loss(expected[step][1]) for step in (2, 4, 6)]
    assert_same(weights(program.model), expected[6][1])


def test_lightning_s_best_checkpoint_is_the_best_average_and_loads_as_one(tmp_path: Path) -> None:
    program, expected = Program(), by_hand(8)
    best = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=1)
    fit(program, tmp_path, 8, best, LightningAverage())
    losses = {step: validation_loss(expected[step][1]) for step in (2, 4, 6, 8)}
    step = min(losses, key=losses.__getitem__)
    loaded = Program.load_from_checkpoint(best.best_model_path, weights_only=True)
    assert_same(weights(loaded.model), expected[step][1])


def test_a_lightning_run_resumed_from_such_a_checkpoint_continues_bit_for_bit(tmp_path: Path) -> None:
    expected = by_hand(10)
    every = [ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}") for _ in range(2)]
    fit(Program(), tmp_path, 6, every[0], LightningAverage())
    program = Program()
    fit(program, tmp_path, 10, every[1], LightningAverage(final=False), checkpoint=tmp_path / "step=4.ckpt")
    assert_same(weights(program.model), expected[10][0])


def test_lightning_gives_the_weights_back_where_a_validation_fails(tmp_path: Path) -> None:
    class Failing(Program):
        def validation_step(self, step: torch.Tensor, _: int) -> None:
            raise ValueError

    program = Failing()
    with pytest.raises(ValueError):
        fit(program, tmp_path, 4, LightningAverage())
    assert_same(weights(program.model), by_hand(2)[2][0])


def test_lightning_shows_the_average_of_a_name(tmp_path: Path) -> None:
    program, other = Program(), Program()
    fit(program, tmp_path, 4, LightningAverage("lookahead"))
    fit(other, tmp_path, 4, LightningAverage("ema"))
    assert not torch.equal(weights(program.model)[0], weights(other.model)[0])
    for label, spec in (("ema", "adamw | lookahead"), (None, "adamw")):
        with pytest.raises(metaopt.StepError, match="no optimizer of the trainer is a stack that keeps an average"):
            fit(Program(spec), tmp_path, 4, LightningAverage(label))


# ---- the Hugging Face Trainer


class Rows(nn.Module):
    """A model as the Trainer wants one; a batch is its number."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small_model()

    def forward(self, number: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        loss = loss_of(self.model, batch(int(number[0])))
        return {"loss": loss, "logits": loss.detach().reshape(1, 1)}


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        self.seen.append({key: value for key, value in metrics.items() if key.endswith("loss")})


def trainer(model: Rows, folder: Path, steps: int, *callbacks: Any, several: bool = False, **how: Any) -> Trainer:
    opt = metaopt.build(model, SPEC)
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        train_sampling_strategy="sequential",
        **{
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "eval_strategy": "steps",
            "eval_steps": 2,
            **how,
        },
    )
    data = [{"number": torch.tensor(i), "labels": torch.tensor(0)} for i in range(12)]
    held_out = [{"number": torch.tensor(99), "labels": torch.tensor(0)}]
    evaluated: Any = {"a": held_out, "b": held_out} if several else held_out
    return Trainer(
        model,
        arguments,
        train_dataset=data,
        eval_dataset=evaluated,
        optimizers=(opt, torch.optim.lr_scheduler.LambdaLR(opt, lambda _: 1.0)),
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("several", [False, True])
def test_the_trainer_evaluates_by_the_average_and_ends_with_it(several: bool, tmp_path: Path) -> None:
    model, expected, losses = Rows(), by_hand(6), Losses()
    trainer(model, tmp_path, 6, TrainerAverage(), losses, several=several).train()
    wanted = [validation_loss(expected[step][1]) for step in (2, 4, 6) for _ in range(1 + several)]
    found = [next(iter(seen.values())) for seen in losses.seen]
    assert found == pytest.approx(wanted, rel=1e-6)
    assert_same(weights(model.model), expected[6][1])


def test_the_trainer_trains_as_without_the_callback(tmp_path: Path) -> None:
    model, expected = Rows(), by_hand(7)
    trainer(model, tmp_path, 7, TrainerAverage(final=False), save_strategy="steps", save_steps=3).train()
    assert_same(weights(model.model), expected[7][0])


def test_the_trainer_saves_averages_and_ends_with_the_best_of_them(tmp_path: Path) -> None:
    model, expected = Rows(), by_hand(8)
    keeping = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    trainer(model, tmp_path, 8, TrainerAverage(), **keeping).train()
    losses = {step: validation_loss(expected[step][1]) for step in (2, 4, 6, 8)}
    for step in losses:
        saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        assert_same([saved[name] for name, _ in model.named_parameters()], expected[step][1])
    assert_same(weights(model.model), expected[min(losses, key=losses.__getitem__)][1])


def test_a_trainer_s_run_resumed_from_such_a_checkpoint_continues_bit_for_bit(tmp_path: Path) -> None:
    expected, again = by_hand(10), Rows()
    keeping = {"save_strategy": "steps", "save_steps": 4}
    trainer(Rows(), tmp_path, 6, TrainerAverage(), **keeping).train()
    resumed = trainer(again, tmp_path / "again", 10, TrainerAverage(final=False), **keeping)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(weights(again.model), expected[10][0])


def test_a_trainer_without_an_average_is_refused(tmp_path: Path) -> None:
    model = Rows()
    running = trainer(model, tmp_path, 2, TrainerAverage())
    running.optimizer = torch.optim.SGD(model.parameters())
    running.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(running.optimizer, lambda _: 1.0)
    with pytest.raises(metaopt.StepError, match="no optimizer of the trainer is a stack"):
        running.train()
