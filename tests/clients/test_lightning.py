"""Lightning: automatic optimization, clipping, checkpoints, mixed precision, the rate monitor, Fabric."""

import csv
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from clients.training import assert_same, batch, loss_of, small_model, train, weights
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import BackboneFinetuning, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import metaopt

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),  # advice on faster loading of data
    pytest.mark.filterwarnings("ignore:.*srun.*command is available.*"),  # on a machine with Slurm, outside of a job
]
SPEC = "clip_grad_norm(0.5) | adamw(lr=warmup(cosine(0.05), 3)) | lookahead(k=3)"


def stack_over(model: nn.Module, spec: str = SPEC) -> metaopt.Stack:
    return metaopt.build(model, spec, total_steps=12)


class Program(lightning.LightningModule):
    """A user's program: the one line that a stack needs stands in `configure_optimizers`."""

    resumable = False

    def __init__(self, spec: str = SPEC, seed: int = 0) -> None:
        super().__init__()
        self.model = small_model(seed)
        self.spec = spec
        self.shown: list[torch.Tensor] = []

    def training_step(self, rows: torch.Tensor, _: int) -> torch.Tensor:
        if self.resumable:  # a plain DataLoader begins anew after a checkpoint
            rows = batch(self.global_step)
        return loss_of(self.model, rows)

    def configure_optimizers(self) -> Any:
        return stack_over(self.model, self.spec)


class Scheduled(Program):
    """A program whose callbacks want a scheduler: the stack's own only reports."""

    def configure_optimizers(self) -> Any:
        opt = stack_over(self.model, self.spec)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": opt.scheduler(), "interval": "step"}}


def fit(program: Program, folder: Path, steps: int, checkpoint: Path | None = None, **how: Any) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        default_root_dir=folder,
        plugins=[LightningEnvironment()],  # not the one of a Slurm job that these tests may run in
        **{"enable_checkpointing": False, **quiet, **how},
    )
    rows = torch.utils.data.DataLoader([batch(step) for step in range(12)], batch_size=None)
    trainer.fit(program, rows, ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize("kind", [Program, Scheduled])
def test_a_program_trains_as_a_loop_of_one_s_own(kind: type[Program], tmp_path: Path) -> None:
    program, model = kind(), small_model()
    opt = stack_over(model)
    trainer = fit(program, tmp_path, 7)
    train(model, opt, 0, 7)
    assert_same(weights(program.model), weights(model))
    assert trainer.optimizers[0].updates == 7


def test_accumulated_batches_are_one_update(tmp_path: Path) -> None:
    program, model = Program(), small_model()
    opt = stack_over(model)
    trainer = fit(program, tmp_path, 3, accumulate_grad_batches=2)
    for step in range(3):
        opt.zero_grad()
        for part in (2 * step, 2 * step + 1):
            (loss_of(model, batch(part)) / 2).backward()
        opt.step()
    assert_same(weights(program.model), weights(model))
    assert trainer.optimizers[0].updates == 3


def test_gradient_clip_val_clips_for_a_stack_that_does_not(tmp_path: Path) -> None:
    unclipped = SPEC.partition(" | ")[2]
    program, model = Program(unclipped), small_model()
    fit(program, tmp_path, 7, gradient_clip_val=0.5)
    train(model, stack_over(model), 0, 7)
    torch.testing.assert_close(weights(program.model), weights(model))


def test_gradient_clip_val_clips_once_more_before_a_stack_that_clips(tmp_path: Path) -> None:
    program, model = Program(), small_model()
    with pytest.warns(metaopt.MetaoptWarning, match="clips them again"):
        fit(program, tmp_path, 7, gradient_clip_val=0.1)
    train(model, stack_over(model, SPEC.replace("0.5", "0.1")), 0, 7)
    torch.testing.assert_close(weights(program.model), weights(model))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", [Program, Scheduled])
@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable.*")
def test_a_run_resumed_in_mid_cycle_continues_bit_for_bit(
    kind: type[Program], precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Program, "resumable", True)
    whole, first, second = kind(), kind(), kind(seed=1)
    fit(whole, tmp_path, 10, precision=precision)
    fit(first, tmp_path, 4, precision=precision).save_checkpoint(tmp_path / "four.ckpt")
    trainer = fit(second, tmp_path, 10, tmp_path / "four.ckpt", precision=precision)
    assert_same(weights(second.model), weights(whole.model))
    assert trainer.optimizers[0].updates == 10


def test_mixed_precision_keeps_weights_and_averages_in_float32(tmp_path: Path) -> None:
    program = Program()
    opt = fit(program, tmp_path, 4, precision="bf16-mixed").optimizers[0]
    assert {p.dtype for p in program.parameters()} == {torch.float32}
    assert {opt.state[p]["lookahead.slow"].dtype for p in program.parameters()} == {torch.float32}


def test_the_rate_monitor_shows_the_stack_s_schedule(tmp_path: Path) -> None:
    program = Scheduled()
    monitor = LearningRateMonitor(logging_interval="step", log_momentum=True, log_weight_decay=True)
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    fit(program, tmp_path, 7, logger=logger, callbacks=[monitor], log_every_n_steps=1)
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    # at every update the rate that it uses
    rate = stack_over(small_model()).schedules["lr"].curve(12, 12)
    assert [float(row["lr-Stack"]) for row in rows] == [rate(t) for t in range(7)]
    assert {row["lr-Stack-momentum"] for row in rows} == {"0.9"}


def test_a_scheduler_beside_the_stack_s_own_is_refused_with_the_way_out(tmp_path: Path) -> None:
    class Twice(Program):
        def configure_optimizers(self) -> Any:
            opt = super().configure_optimizers()
            return [opt], [{"scheduler": torch.optim.lr_scheduler.StepLR(opt, 1), "interval": "step"}]

    with pytest.raises(metaopt.ScheduleConflict, match=r"opt\.scheduler\(\)"):
        fit(Twice(), tmp_path, 7)


def test_validation_sees_the_fast_weights_and_in_averaged_the_slow_ones(tmp_path: Path) -> None:
    class Validated(Program):
        def on_validation_start(self) -> None:
            self.shown.append(weights(self.model)[0])
            self.swap = self.optimizers().averaged()
            self.swap.__enter__()
            self.shown.append(weights(self.model)[0])

        def on_validation_end(self) -> None:
            self.swap.__exit__(None, None, None)

        def validation_step(self, rows: torch.Tensor, _: int) -> torch.Tensor:
            return loss_of(self.model, rows)

        def val_dataloader(self) -> Any:
            return torch.utils.data.DataLoader([batch(0)], batch_size=None)

    program, model = Validated(), small_model()
    opt = stack_over(model)
    fit(program, tmp_path, 5, num_sanity_val_steps=0, val_check_interval=5)
    train(model, opt, 0, 5)
    assert_same(weights(program.model), weights(model))  # and leaves them
    with opt.averaged():
        assert_same(program.shown, [program.shown[0], weights(model)[0]])
    assert_same(program.shown, [weights(model)[0], program.shown[1]])
    assert not torch.equal(*program.shown)


def test_fabric_trains_as_a_loop_of_one_s_own() -> None:
    model, twin = small_model(), small_model()
    opt = stack_over(model)
    fabric = lightning.Fabric(accelerator="cpu", devices=1, plugins=[LightningEnvironment()])
    wrapped, prepared = fabric.setup(model, opt)
    for step in range(7):
        prepared.zero_grad()
        fabric.backward(loss_of(wrapped, batch(step)))
        prepared.step()
    train(twin, stack_over(twin), 0, 7)
    assert_same(weights(model), weights(twin))
    assert opt.updates == 7


class HeadFirst(Program):
    """A program whose head is trained first; a callback adds the backbone later."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.model[0]

    def configure_optimizers(self) -> metaopt.Stack:
        return metaopt.build(self.model[2], "adamw(lr=warmup(0.01, 4)) | lookahead(k=2)")


@pytest.mark.filterwarnings("ignore:lr was set by hand:metaopt.MetaoptWarning")  # as this callback does at every epoch
def test_a_callback_that_adds_the_backbone_gives_it_a_proportion_of_the_schedule(tmp_path: Path) -> None:
    program = HeadFirst()
    before = weights(program.backbone)
    callback = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    trainer = fit(program, tmp_path, -1, max_epochs=3, limit_train_batches=3, callbacks=[callback])
    (opt,) = trainer.optimizers
    # a tenth of 0.0075, the rate at epoch 1, and at epoch 2 twice that, beside 0.01
    assert [group["lr"] for group in opt.param_groups] == [0.01, pytest.approx(0.0015)]
    assert not torch.equal(before[0], program.backbone.weight)
