"""A stack that clips after a client has clipped says so once."""

import contextlib
import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from lightning.fabric.plugins.environments import LightningEnvironment
from torch import nn
from transformers import Trainer, TrainingArguments

import metaopt

AGAIN = r"clipped to a norm of {} before step\(\), and clip_grad_norm in the stack clips them again"


@pytest.fixture(autouse=True)
def nothing_shared_between_tests():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 3)


def loss_of(net: nn.Module, step: int) -> torch.Tensor:
    return net(torch.randn(4, 5, generator=torch.Generator().manual_seed(step))).square().mean() * 100


def stack_over(net: nn.Module, spec: str = "clip_grad_norm(5.0) | sgd(lr=1e-4)") -> metaopt.Stack:
    return metaopt.build(net.parameters(), spec)


def loop(opt: Any, net: nn.Module, between: Any, steps: int = 3, backward: Any = torch.Tensor.backward) -> None:
    for step in range(steps):
        opt.zero_grad()
        backward(loss_of(net, step))
        between(list(net.parameters()))
        opt.step()


def norm(size: float) -> Any:
    return lambda params: nn.utils.clip_grad_norm_(params, size)


# ---- clients


def places(seen: Any) -> set[str]:
    """Return the files that metaopt's warnings point at."""
    return {warning.filename for warning in seen if issubclass(warning.category, metaopt.MetaoptWarning)}


class Rows(nn.Module):
    """A model as the Hugging Face Trainer wants one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.layer(x) - labels).square().mean() * 100}


@pytest.mark.parametrize("given", [{}, {"max_grad_norm": 0.5}, {"max_grad_norm": 0.0}])
def test_the_trainer_s_default_clip_is_named(given: dict[str, float], tmp_path: Path) -> None:
    net = Rows()
    opt = stack_over(net)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        **{"report_to": "none", "disable_tqdm": True, "use_cpu": True, "lr_scheduler_type": "constant", **given},
    )
    data = [{"x": torch.ones(2), "labels": torch.ones(1)} for _ in range(8)]
    clip = given.get("max_grad_norm", 1.0)
    told = pytest.warns(metaopt.MetaoptWarning, match=AGAIN.format(f"{clip:g}")) if clip else contextlib.nullcontext()
    with told as seen:
        Trainer(net, arguments, train_dataset=data, optimizers=(opt, None)).train()
    assert not clip or places(seen) == {__file__}


class Program(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = model()

    def training_step(self, step: torch.Tensor, _: int) -> torch.Tensor:
        return loss_of(self.net, int(step))

    def configure_optimizers(self) -> Any:
        return stack_over(self.net)


@pytest.mark.parametrize("how", ["norm", "value", None])
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*srun.*command is available.*")
def test_lightning_s_clips_are_named(how: str | None, tmp_path: Path) -> None:
    quiet = dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"], False)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=2,
        default_root_dir=tmp_path,
        plugins=[LightningEnvironment()],
        **quiet,
        **({} if how is None else {"gradient_clip_val": 2.0, "gradient_clip_algorithm": how}),
    )
    said = "clipped to a norm of 2 " if how == "norm" else "clipped to values of 2 "
    told = contextlib.nullcontext() if how is None else pytest.warns(metaopt.MetaoptWarning, match=said)
    with told as seen:
        trainer.fit(Program(), torch.utils.data.DataLoader(torch.arange(4), batch_size=None))
    assert how is None or places(seen) == {__file__}


def test_accelerate_s_clip_is_named() -> None:
    net, accelerator = model(), Accelerator(cpu=True)
    opt = accelerator.prepare(stack_over(net))
    with pytest.warns(metaopt.MetaoptWarning, match=AGAIN.format("0.25")) as told:
        loop(opt, net, lambda params: accelerator.clip_grad_norm_(params, 0.25), backward=accelerator.backward)
    assert len(told) == 1


# ---- loops


@pytest.mark.parametrize("spec", ["clip_grad_value(0.1)", "zclip", "adaptive_grad_clip(0.01)"])
def test_every_part_that_clips_is_named(spec: str) -> None:
    net = model()
    with pytest.warns(metaopt.MetaoptWarning, match=rf"and {spec.partition('(')[0]} in the stack clips them again"):
        loop(stack_over(net, f"{spec} | sgd(lr=1e-4)"), net, norm(1.0))


@pytest.mark.parametrize("kind", ["closure", "float64", "bfloat16", "late"])
def test_a_clip_in_the_loop_is_found(kind: str) -> None:
    net = model().to(getattr(torch, kind, torch.float32))
    opt = stack_over(net)

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = net(torch.ones(2, 5, dtype=net.weight.dtype)).square().mean() * 100
        loss.backward()
        norm(1e9 if kind == "late" and opt.updates < 4 else 0.5)(list(net.parameters()))
        return loss

    with pytest.warns(metaopt.MetaoptWarning, match=AGAIN.format("0.5")):
        for _ in range(6):
            if kind == "closure":
                opt.step(closure)
            else:
                closure()
                opt.step()


@pytest.mark.parametrize(
    "between",
    [
        lambda params: None,
        norm(1e9),
        lambda params: [p.grad.div_(3) for p in params],  # accumulated batches
        lambda params: [p.grad.mul_(2.0**-16) for p in params],  # an unscaled loss
        lambda params: [p.grad.clamp_(-1e9, 1e9) for p in params],
        lambda params: [p.grad.add_(p.detach(), alpha=0.1) for p in params],
        lambda params: [p.grad.zero_() for p in params],
        lambda params: [setattr(p, "grad", torch.ones_like(p)) for p in params],
    ],
)
def test_what_is_no_clip_is_not_taken_for_one(between: Any) -> None:
    net = model()
    loop(stack_over(net), net, between, steps=12)


def test_a_stack_that_does_not_clip_goes_with_any_clip() -> None:
    net = model()
    loop(stack_over(net, "sgd(lr=1e-4)"), net, norm(1.0))
    assert not net.weight._post_accumulate_grad_hooks


def test_nothing_is_left_on_the_parameters() -> None:
    net = model()
    opt = stack_over(net)
    loop(opt, net, norm(1e9), steps=12)
    assert not net.weight._post_accumulate_grad_hooks
    assert opt._run.second_clip is None


def test_a_scaler_unscales_without_a_word() -> None:
    net = model()
    opt, scaler = stack_over(net), torch.amp.GradScaler("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error", metaopt.MetaoptWarning)
        for step in range(3):
            opt.zero_grad()
            scaler.scale(loss_of(net, step)).backward()
            scaler.step(opt)
            scaler.update()
