"""SAM evaluates the loss twice for an update; batch norm counts the batch once, whoever steps."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from lightning.fabric.plugins.environments import LightningEnvironment
from torch import nn

import metaopt

SPEC = "sam(rho=0.5) | sgd(lr=0.1)"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def batch(step: int) -> torch.Tensor:
    return torch.randn(16, 3, generator=torch.Generator().manual_seed(step))


def expected_after(steps: int) -> nn.Sequential:
    """Return the network after SAM by hand, as the paper's code has it: the second pass leaves the statistics alone."""
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        opt.zero_grad()
        model(batch(step)).square().mean().backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        climbs = [0.5 * p.grad / norm for p in model.parameters()]
        with torch.no_grad():
            for p, climb in zip(model.parameters(), climbs, strict=True):
                p.add_(climb)
        opt.zero_grad()
        momentum, model[1].momentum = model[1].momentum, 0.0
        count = model[1].num_batches_tracked.clone()
        model(batch(step)).square().mean().backward()
        model[1].momentum, model[1].num_batches_tracked = momentum, count
        with torch.no_grad():
            for p, climb in zip(model.parameters(), climbs, strict=True):
                p.sub_(climb)
        opt.step()
    return model


def stack_over(model: nn.Module, kind: str) -> metaopt.Stack:
    if kind == "wrap":  # it knows no model
        return metaopt.wrap(torch.optim.SGD(model.parameters(), lr=0.1), "sam(rho=0.5)")
    return metaopt.build(model, SPEC)


def closure_of(opt: Any, model: nn.Module, step: int) -> Any:
    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = model(batch(step)).square().mean()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("kind", ["build", "wrap"])
@pytest.mark.parametrize("around", ["plain", "compiled", "inner module"])
def test_a_batch_is_counted_once(kind: str, around: str) -> None:
    model = network()
    opt = stack_over(model, kind)
    called: Any = torch.compile(model, backend="eager") if around == "compiled" else model
    called = nn.Sequential(model) if around == "inner module" else called
    for step in range(3):
        opt.step(closure_of(opt, called, step))
    twin = expected_after(3)
    assert model[1].num_batches_tracked == 3
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("kind", ["build", "wrap"])
def test_statistics_are_right_where_the_second_evaluation_raises(kind: str) -> None:
    model = network()
    opt = stack_over(model, kind)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(1)
        loss = closure_of(opt, model, 0)()
        if len(calls) == 2:
            raise ValueError
        return loss

    with pytest.raises(ValueError):
        opt.step(closure)
    assert model[1].num_batches_tracked == 1


class Program(lightning.LightningModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.model, self.kind = network(), kind

    def training_step(self, rows: torch.Tensor, _: int) -> torch.Tensor:
        return self.model(rows).square().mean()

    def configure_optimizers(self) -> Any:
        return stack_over(self.model, self.kind)


@pytest.mark.parametrize("kind", ["build", "wrap"])
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*srun.*command is available.*")
def test_a_batch_is_counted_once_in_lightning(kind: str, tmp_path: Path) -> None:
    program = Program(kind)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    lightning.Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_steps": 3, "enable_checkpointing": False, **quiet},
        default_root_dir=tmp_path,
        plugins=[LightningEnvironment()],
    ).fit(program, torch.utils.data.DataLoader([batch(step) for step in range(3)], batch_size=None))
    torch.testing.assert_close(program.model.state_dict(), expected_after(3).state_dict())


def test_a_batch_is_counted_once_in_accelerate() -> None:
    model = network()
    prepared_model, prepared = Accelerator(cpu=True).prepare(model, stack_over(model, "build"))
    for step in range(3):
        prepared.step(closure_of(prepared, prepared_model, step))
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    torch.testing.assert_close(model.state_dict(), expected_after(3).state_dict())
