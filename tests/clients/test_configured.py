"""`metaopt.Optimizer` from the configuration of six programs, none of which has a line about metaopt."""

import argparse
import ast
import copy
import importlib
import importlib.util
import io
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI, OptimizerCallable
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import metaopt

SPEC = "clip_grad_norm(1.0) | adamw | lookahead(k=2)"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
    return x, x.sum(1, keepdim=True)


def trained(opt: torch.optim.Optimizer, model: nn.Module, steps: int = 5) -> list[torch.Tensor]:
    for _ in range(steps):
        x, y = data()
        opt.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        opt.step()
    return [p.detach().clone() for p in model.parameters()]


def as_built(spec: str = "clip_grad_norm(1.0) | adamw(lr=0.02, weight_decay=0.1) | lookahead(k=2)") -> Any:
    model = net()
    return trained(metaopt.build(model.parameters(), spec), model)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, a, b))


# ---- the class


def test_the_class_builds_what_build_builds() -> None:
    model = net()
    opt = metaopt.Optimizer(model.parameters(), lr=0.02, spec=SPEC, weight_decay=0.1)
    assert isinstance(opt, metaopt.Stack) and isinstance(opt, torch.optim.Optimizer)
    assert same(trained(opt, model), as_built())
    assert "lr=0.02" in str(opt.spec) and "weight_decay=0.1" in str(opt.spec)


def test_without_a_spec_it_is_adamw_and_a_part_s_hyperparameter_has_its_label() -> None:
    assert str(metaopt.Optimizer(net().parameters()).spec) == "adamw"
    opt = metaopt.Optimizer(net().parameters(), spec="adamw | lookahead", **{"lookahead.k": 7, "lr": "1e-2"})
    assert str(opt.spec) == "adamw(lr=0.01) | lookahead(k=7)"
    rising = metaopt.Optimizer(net().parameters(), lr="warmup(cosine(0.1), 10)", total_steps=100)
    assert rising.param_groups[0]["lr"] == 0.0


def test_a_rate_goes_to_the_bases_that_leave_theirs_open() -> None:
    spec = "partition({'0.*': sgd(lr=0.5), '*': adamw})"
    opt = metaopt.Optimizer(net(), lr=0.02, spec=spec)
    assert [group["lr"] for group in opt.param_groups] == [0.5, 0.02]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"lr": 0.1, "spec": "adamw(lr=0.2)"}, "adamw: lr is given twice, as 0.2 in the spec and as 0.1 beside it"),
        ({"lr": 0.1, "spec": "partition({'*': sgd(lr=0.2)})"}, "lr is given twice"),
        ({"wd": 0.1}, "no part of this stack has the hyperparameter 'wd'"),
        ({"weight_decai": 0.1}, "Did you mean weight_decay"),
        ({"spec": "adamw | lookahead", "k": 5}, r"Did you mean lookahead\.k\?"),
        ({"momentum": 0.9}, "no part of this stack has the hyperparameter 'momentum'"),
    ],
)
def test_hyperparameters_that_do_not_fit_are_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(metaopt.MetaoptError, match=told):
        metaopt.Optimizer(net(), **given)


def test_the_same_value_twice_is_no_contradiction() -> None:
    assert metaopt.Optimizer(net(), lr=0.1, spec="adamw(lr=0.1)").param_groups[0]["lr"] == 0.1


def test_it_is_copied_saved_and_loaded_like_every_stack() -> None:
    model = net()
    opt = metaopt.Optimizer(model.parameters(), lr=0.02, spec=SPEC, weight_decay=0.1)
    trained(opt, model, 3)
    file = io.BytesIO()
    torch.save(opt, file)
    file.seek(0)
    for again in (torch.load(file, weights_only=False), copy.deepcopy(opt)):
        assert type(again) is metaopt.Optimizer and again.updates == 3
    other = metaopt.build(net().parameters(), opt.spec)
    other.load_state_dict(opt.state_dict())
    assert other.updates == 3


# ---- six programs, by configuration alone


def test_hydra() -> None:
    configuration = OmegaConf.create(
        """
        optimizer:
          _target_: metaopt.Optimizer
          lr: 2e-2
          weight_decay: 0.1
          spec:
            - clip_grad_norm: 1.0
            - adamw
            - lookahead: {k: 2}
        """
    )
    model = net()
    opt = hydra.utils.instantiate(configuration.optimizer, params=model.parameters())
    assert same(trained(opt, model), as_built())
    partial = hydra.utils.instantiate({**configuration.optimizer, "_partial_": True, "_convert_": "all"})
    model = net()
    assert same(trained(partial(model.parameters()), model), as_built())


class Module(LightningModule):
    """A module of a program that knows nothing of metaopt."""

    def __init__(self, optimizer: OptimizerCallable = torch.optim.AdamW) -> None:
        super().__init__()
        self.net = net()
        self.optimizer = optimizer

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def train_dataloader(self) -> DataLoader:  # type: ignore[type-arg]
        return DataLoader(TensorDataset(*data()), batch_size=8)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


LIGHTNING = """
trainer: {max_epochs: 5, accelerator: cpu, logger: false, enable_checkpointing: false, enable_progress_bar: false,
          enable_model_summary: false}
"""


@pytest.mark.filterwarnings("ignore")  # of Lightning, about workers
def test_lightning_cli_of_the_model_s_own_optimizer(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        LIGHTNING
        + """
model:
  optimizer:
    class_path: metaopt.Optimizer
    init_args:
      lr: 2e-2
      spec: clip_grad_norm(1.0) | adamw | lookahead(k=2)
    dict_kwargs: {weight_decay: 0.1}
"""
    )
    cli = LightningCLI(Module, args=["fit", "--config", str(tmp_path / "config.yaml")], save_config_callback=None)
    assert type(cli.trainer.optimizers[0]) is metaopt.Optimizer
    assert same([p.detach() for p in cli.model.net.parameters()], as_built())


@pytest.mark.filterwarnings("ignore")
def test_lightning_cli_in_place_of_configure_optimizers(tmp_path: Path) -> None:
    class Bare(Module):
        def __init__(self) -> None:
            super().__init__()

        configure_optimizers = LightningModule.configure_optimizers

    (tmp_path / "config.yaml").write_text(
        LIGHTNING
        + """
optimizer:
  class_path: metaopt.Optimizer
  init_args:
    spec:
      - clip_grad_norm: 1.0
      - adamw: {lr: 2e-2, weight_decay: 0.1}
      - lookahead: {k: 2}
"""
    )
    cli = LightningCLI(
        Bare, args=["fit", "--config", str(tmp_path / "config.yaml")], save_config_callback=None,
        auto_configure_optimizers=True,
    )  # fmt: skip
    assert same([p.detach() for p in cli.model.net.parameters()], as_built())


def test_the_trainer_s_class_and_arguments(tmp_path: Path) -> None:
    from clients.test_trainer import TEXTS, language_model, weights
    from transformers import Trainer, TrainingArguments

    configuration = json.loads('{"spec": "adamw | lookahead(k=2)", "lr": 0.02}')

    def run(**how: Any) -> Any:
        arguments = TrainingArguments(
            str(tmp_path), max_steps=5, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
            max_grad_norm=0, weight_decay=0.1, lr_scheduler_type="constant", train_sampling_strategy="sequential",
        )  # fmt: skip
        model = language_model()
        trainer = Trainer(model, arguments, train_dataset=TEXTS, **how)
        trainer.train()
        return trainer, weights(model)

    by_class, found = run(optimizer_cls_and_kwargs=(metaopt.Optimizer, configuration))
    assert [group["weight_decay"] for group in by_class.optimizer.optimizer.param_groups] == [0.1, 0.0]
    _, expected = run(optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 0.02, "fused": True}))
    assert not same(list(found), list(expected)) and by_class.optimizer.optimizer.updates == 5


def test_a_class_path_and_arguments_of_a_command_line() -> None:
    # as kohya's scripts read them: --optimizer_type a.b.C --optimizer_args k=v k=v, with one `=` in each
    arguments = ["weight_decay=0.1", "spec={'clip_grad_norm': 1.0, 'adamw': None, 'lookahead': {'k': 2}}"]
    module, _, name = "metaopt.Optimizer".rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    keywords = {key: ast.literal_eval(value) for key, value in (argument.split("=") for argument in arguments)}
    model = net()
    assert same(trained(kind(model.parameters(), lr=0.02, **keywords), model), as_built())


# timm's own files, without those that need torchvision: packages that import nothing, with what `timm.optim` needs
TIMM = {
    "timm": {},
    "timm.layers": {"use_reentrant_ckpt": "timm.layers.config"},
    "timm.models": {"group_parameters": "timm.models._manipulate"},
}


@pytest.fixture
def timm_optim() -> Iterator[Any]:
    """The module `timm.optim` as it is installed; torchvision need not be."""
    found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        pytest.skip("timm is not installed: pip install --no-deps -c constraints.txt timm")
    before = dict(sys.modules)
    for name, taken in TIMM.items():
        package = sys.modules[name] = types.ModuleType(name)
        package.__path__ = [str(Path(found.origin).parent.joinpath(*name.split(".")[1:]))]
        for attribute, home in taken.items():
            setattr(package, attribute, getattr(importlib.import_module(home), attribute))
    try:
        yield importlib.import_module("timm.optim")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "timm" and name not in before]:
            del sys.modules[name]


def test_timm_s_factory(timm_optim: Any) -> None:
    factory = importlib.import_module("timm.optim._optim_factory")
    factory.default_registry.register(factory.OptimInfo("metaopt", "metaopt.Optimizer", has_eps=False))
    model = net()
    opt = timm_optim.create_optimizer_v2(
        model, opt="metaopt", lr=0.02, weight_decay=0.1, filter_bias_and_bn=False,
        spec="clip_grad_norm(1.0) | adamw | lookahead(k=2)",
    )  # fmt: skip
    assert type(opt) is metaopt.Optimizer and same(trained(opt, model), as_built())


class Layered(nn.Sequential):
    """A model that tells timm what its layers are, as timm's models do."""

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"blocks": r"^(\d+)"}


def test_timm_s_factory_with_its_own_groups(timm_optim: Any) -> None:
    # as its training script calls it: `--opt metaopt --layer-decay 0.5 --opt-kwargs spec=...`
    factory = importlib.import_module("timm.optim._optim_factory")
    factory.default_registry.register(factory.OptimInfo("metaopt", "metaopt.Optimizer", has_eps=False))
    model = Layered(*net())
    arguments = argparse.Namespace(opt="metaopt", lr=0.02, weight_decay=0.1, momentum=0.9, layer_decay=0.5)
    opt = timm_optim.create_optimizer_v2(model, **timm_optim.optimizer_kwargs(arguments), spec=SPEC)
    rates = [0.01, 0.01, 0.02, 0.02]  # two layers, with and without decay
    assert [(group["lr"], group["weight_decay"]) for group in opt.param_groups] == [
        *zip(rates, [0.1, 0.0] * 2, strict=True)
    ]
    trained(opt, model)
    assert opt.updates == 5
    # its schedulers multiply by a group's factor themselves; the stack has done it
    scheduler = importlib.import_module("timm.scheduler.cosine_lr").CosineLRScheduler(opt, t_initial=10)
    scheduler.step(5)
    assert [group["lr"] for group in opt.param_groups] == [pytest.approx(rate / 2) for rate in rates]
