"""Old checkpoints of every kind: each continues exactly, or is refused with the reason; none is silently wrong.

Checkpoints of earlier code of this project are in test_old_checkpoints.py, those of another number of processes in
test_distributed_checkpoint.py.
"""

import copy
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from clients.test_lightning import Program, fit
from clients.test_trainer import language_model, trainer
from clients.training import assert_same, small_model, train, weights

import metaopt

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),  # advice on faster loading of data
    pytest.mark.filterwarnings("ignore:.*srun.*command is available.*"),  # on a machine with Slurm, outside of a job
]
DATA = Path(__file__).parent.parent / "data"
VERSIONS = ("2.9.1", "2.10.0", "2.11.0", "2.12.1", "2.13.0")
STACKS = {"AdamW": "adamw(lr=0.01, weight_decay=0.1)", "SGD": "sgd(lr=0.05, momentum=0.9)"}


def writer() -> ModuleType:
    """Return the program that wrote the files of other versions of torch."""
    spec = importlib.util.spec_from_file_location("write_bare_checkpoints", DATA / "write_bare_checkpoints.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_version_of_torch_has_its_files() -> None:
    expected = {f"{kind.lower()}-torch-{version}.pt" for kind in STACKS for version in VERSIONS}
    assert {file.name for file in (DATA / "bare").iterdir()} == expected


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", STACKS)
def test_1_a_bare_optimizer_s_of_another_version_of_torch(kind: str, version: str) -> None:
    program = writer()
    saved = torch.load(DATA / "bare" / f"{kind.lower()}-torch-{version}.pt", weights_only=True)
    model, twin = program.model(), program.model()
    opt = metaopt.build(model.named_parameters(), STACKS[kind])
    # the kernel that torch takes if nobody chooses
    bare = getattr(torch.optim, kind)(
        twin.named_parameters(), fused=opt.param_groups[0].get("fused"), **saved["arguments"]
    )
    for network, optimizer in ((model, opt), (twin, bare)):
        network.load_state_dict(saved["model"])
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    assert opt.load_report.differences == []
    assert opt.updates == (program.STEPS if kind == "AdamW" else 0)
    bare.param_groups[0]["fused"] = opt.param_groups[0]["fused"]
    for step, expected in enumerate(saved["continued"], program.STEPS):
        program.update(model, opt, step)
        program.update(twin, bare, step)
        assert_same(weights(model), weights(twin))
        for name, p in model.state_dict().items():  # what that torch itself made of it
            torch.testing.assert_close(p, expected[name], rtol=1e-10, atol=1e-12)


def bare_run() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = small_model()
    opt = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, fused=True)
    train(model, opt, 0, 4)
    return model, opt


def continued(model: torch.nn.Module, opt: Any, other: torch.nn.Module, stack: Any) -> None:
    """Hold that a stack goes on from the other's weights exactly as the optimizer does."""
    other.load_state_dict(model.state_dict())
    train(model, opt, 4, 9)
    train(other, stack, 4, 9)
    by_name = dict(other.named_parameters())
    for name, p in model.named_parameters():
        assert_same(by_name[name], p)


def test_2_another_layout_of_the_groups() -> None:
    model, opt = bare_run()
    twin = small_model()
    stack = metaopt.build(metaopt.groups(twin, {"*.bias": {}}), "adamw(lr=0.01, weight_decay=0.1)")
    saved = copy.deepcopy(opt.state_dict())
    with pytest.raises(metaopt.CheckpointError, match=r"groups of \[4\].*\[2, 2\].*names"):
        stack.load_state_dict(saved)
    stack.load_state_dict(saved, names=twin.named_parameters())
    continued(model, opt, twin, stack)


def test_3_another_order_of_the_parameters() -> None:
    model = small_model()
    opt = metaopt.build(model, "adamw(lr=0.01) | lookahead(k=3)")
    train(model, opt, 0, 4)
    twin = small_model()
    stack = metaopt.build(list(twin.named_parameters())[::-1], "adamw(lr=0.01) | lookahead(k=3)")
    stack.load_state_dict(copy.deepcopy(opt.state_dict()))
    continued(model, opt, twin, stack)


def test_4_a_longer_run() -> None:
    spec = "adamw(lr=cosine(0.01)) | lookahead(k=3)"
    model = small_model()
    opt = metaopt.build(model, spec, total_steps=20)
    train(model, opt, 0, 4)
    twin = small_model()
    stack = metaopt.build(twin, spec, total_steps=10)
    with pytest.raises(metaopt.CheckpointError, match="extend=True"):
        stack.load_state_dict(copy.deepcopy(opt.state_dict()))
    stack.load_state_dict(copy.deepcopy(opt.state_dict()), extend=True)
    # the reference: torch's schedule of the shorter run at the same count
    plain = torch.nn.Linear(1, 1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD(plain.parameters(), lr=0.01), T_max=10)
    for _ in range(4):
        scheduler.optimizer.step()
        scheduler.step()
    assert stack.param_groups[0]["lr"] == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
    whole = metaopt.build(small_model(), spec, total_steps=20)
    whole.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert whole.param_groups[0]["lr"] == opt.param_groups[0]["lr"]


def test_5_fewer_layers() -> None:
    model = small_model()
    opt = metaopt.build(model, "adamw(lr=0.01) | ema(0.9)")
    train(model, opt, 0, 4)
    head = model[2]
    stack = metaopt.build([(f"2.{name}", p) for name, p in head.named_parameters()], "adamw(lr=0.01) | ema(0.9)")
    with pytest.warns(UserWarning, match="this stack does not have: 0.weight, 0.bias"):
        stack.load_state_dict(copy.deepcopy(opt.state_dict()))
    for p in head.parameters():
        assert_same(dict(stack.state[p]), dict(opt.state[p]))


class Bare(Program):
    """A program as it was before it had a stack."""

    resumable = True

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.model.parameters(), lr=0.01, fused=True)


class Moved(Bare):
    """The same program with a stack."""

    def configure_optimizers(self) -> Any:
        return metaopt.build(self.model, "adamw(lr=0.01)")


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable.*")
def test_6_lightning_s(tmp_path: Path) -> None:
    trainer = fit(Bare(), tmp_path, 4)
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    bare, moved = Bare(seed=1), Moved(seed=2)
    fit(bare, tmp_path, 8, tmp_path / "old.ckpt")
    done = fit(moved, tmp_path, 8, tmp_path / "old.ckpt")
    assert done.optimizers[0].updates == 8
    assert_same(weights(moved.model), weights(bare.model))


@pytest.fixture
def accelerator_state() -> Any:
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


def test_7_accelerate_s(tmp_path: Path, accelerator_state: None) -> None:
    accelerator = Accelerator(cpu=True)
    model, opt = accelerator.prepare(*bare_run())
    accelerator.save_state(str(tmp_path))
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    twin = small_model(seed=1)
    stack = metaopt.build(twin, "adamw(lr=0.01, weight_decay=0.1)")
    again = Accelerator(cpu=True)
    again.prepare(twin, stack)
    again.load_state(str(tmp_path))
    assert stack.updates == 4
    assert_same(weights(twin), weights(model))
    continued(model, opt, twin, stack)


@pytest.mark.slow
def test_8_the_trainer_s_own_optimizer(tmp_path: Path, accelerator_state: None) -> None:
    how = {"lr_scheduler_type": "constant", "learning_rate": 0.01, "weight_decay": 0.1, "save_strategy": "steps"}
    trainer(language_model(), (None, None), tmp_path, 4, save_steps=4, **how).train()
    old = str(tmp_path / "checkpoint-4")
    bare, model = language_model(1), language_model(2)
    trainer(bare, (None, None), tmp_path, 8, save_steps=100, **how).train(resume_from_checkpoint=old)
    # the same groups in the same order: matrices with decay, then biases and norms without
    stack = metaopt.build(metaopt.groups(model, no_decay="1d"), "adamw(lr=0.01, weight_decay=0.1)")
    trainer(model, (stack, stack.scheduler()), tmp_path, 8, save_steps=100, **how).train(resume_from_checkpoint=old)
    assert stack.updates == 8
    assert_same(weights(model), weights(bare))


def test_9_and_with_another_base_s_each_is_refused_and_nothing_changes() -> None:
    model, opt = bare_run()
    stack = metaopt.build(model, "sgd(lr=0.1, momentum=0.9) | lookahead")
    with pytest.raises(metaopt.CheckpointError, match="another base than SGD"):
        stack.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert (stack.updates, len(stack.state)) == (0, 0)
