"""The bridge as it is installed: found by its entry point, usable in a spec, its classes unchanged."""

import inspect
from importlib.metadata import entry_points

import pytest
import pytorch_optimizer
import torch

import metaopt
from metaopt.registry import registry

NAMES = [name for name in registry.names("optimizer") if name.startswith("pytorch_optimizer.")]


def test_the_entry_point_is_installed():
    assert "metaopt_pytorch_optimizer" in {point.value for point in entry_points(group="metaopt")}


def test_no_plugin_is_broken():
    assert registry.broken() == []


def test_the_bridge_offers_the_package_and_leaves_torchs_own_classes_alone():
    assert len(NAMES) > 100
    assert "pytorch_optimizer.adopt" in NAMES
    assert "pytorch_optimizer.adamw" not in NAMES


def test_classes_are_unchanged():
    entry = registry.find("pytorch_optimizer.adopt", "optimizer")
    assert entry.target is pytorch_optimizer.ADOPT
    assert entry.origin == "metaopt-pytorch-optimizer"


@pytest.mark.parametrize("name", NAMES)
def test_every_offered_class_takes_parameters_first(name):
    assert next(iter(inspect.signature(registry.find(name).target).parameters)) == "params"


@pytest.mark.parametrize("name", ["adopt", "lion", "adabelief", "adan"])
def test_a_bridged_optimizer_trains_inside_a_stack(name):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    inputs = torch.randn(32, 4)
    targets = inputs.sum(1, keepdim=True)
    opt = metaopt.build(model, f"clip_grad_norm(1.0) | pytorch_optimizer.{name}(lr=0.02) | lookahead(k=5)")
    losses = []
    for _ in range(60):
        opt.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert opt.updates == 60


def test_the_plain_optimizer_and_the_bridged_one_do_the_same_bit_for_bit():
    ours, theirs = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
    theirs.load_state_dict(ours.state_dict())
    stack = metaopt.build(ours, "pytorch_optimizer.adopt(lr=0.01)")
    plain = pytorch_optimizer.ADOPT(theirs.parameters(), lr=0.01)
    inputs = torch.randn(8, 4)
    for _ in range(5):
        for model, optimizer in ((ours, stack), (theirs, plain)):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
    assert torch.equal(ours.weight, theirs.weight)
