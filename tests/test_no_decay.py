"""`groups(no_decay=...)` spares parameters from every decay of a stack: the base's own, and that of wrappers."""

from typing import Any

import pytest
import torch

import metaopt


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))


def moved(opt: metaopt.Stack, model: torch.nn.Module) -> set[str]:
    """Return the names of the parameters that an update without a gradient from the loss changes: the decayed ones."""
    for p in model.parameters():
        torch.nn.init.ones_(p)
        p.grad = torch.zeros_like(p)
    opt.step()
    return {name for name, p in model.named_parameters() if not bool((p == 1).all())}


@pytest.mark.parametrize(
    "spec",
    [
        "decay(0.1) | sgd(lr=0.1)",
        "l2(0.1) | sgd(lr=0.1)",
        "l2(0.1, label='penalty') | decay(0.1) | adamw(lr=0.1, weight_decay=0.1)",
        "decay(0.1) | rprop(lr=0.1)",  # a base without a decay of its own
        "decay(0.1) | partition({'0.*': sgd(lr=0.1, weight_decay=0.1), '*': l2(0.1) | rprop(lr=0.1)})",
    ],
)
def test_no_decay_reaches_the_decays_of_wrappers(spec: str) -> None:
    model = net()
    opt = metaopt.build(metaopt.groups(model, no_decay="1d"), spec)
    assert moved(opt, model) == {"0.weight"}


def test_a_glob_that_sets_no_decay_reaches_them_too() -> None:
    model = net()
    opt = metaopt.build(metaopt.groups(model, {"*.bias": {"weight_decay": 0.0}}), "decay(0.1) | sgd(lr=0.1)")
    assert moved(opt, model) == {"0.weight", "1.weight"}


def test_no_decay_reaches_the_parts_that_wrap_puts_around_an_optimizer() -> None:
    model = net()
    opt = metaopt.wrap(torch.optim.SGD(metaopt.groups(model, no_decay="1d"), lr=0.1), "decay(0.1)")
    assert moved(opt, model) == {"0.weight"}


def test_no_decay_reaches_a_group_that_is_added_later() -> None:
    model = net()
    decayed, spared = metaopt.groups(model, no_decay="1d")
    opt = metaopt.build([decayed], "decay(0.1) | sgd(lr=0.1)")
    opt.add_param_group(spared)
    assert moved(opt, model) == {"0.weight"}


def test_a_decay_that_a_group_sets_by_its_full_name_is_kept() -> None:
    model = net()
    rules = {"*.bias": {"weight_decay": 0.0, "decay.weight_decay": 0.3}, "1.*": {"weight_decay": 0.0}}
    opt = metaopt.build(metaopt.groups(model, rules), "decay(0.1) | sgd(lr=0.1)")
    assert {g["name"]: g["decay.weight_decay"] for g in opt.param_groups} == {"*.bias": 0.3, "1.*": 0.0, "rest": 0.1}


def test_no_decay_beside_a_scheduled_decay_is_an_error() -> None:
    spec = "decay(linear(0.1, 0.2, steps=5)) | sgd(lr=0.1)"
    with pytest.raises(metaopt.HyperparameterError, match=r"no_decay is to have no decay.*decay\.weight_decay"):
        metaopt.build(metaopt.groups(net(), no_decay="1d"), spec)


def test_the_groups_also_serve_a_plain_optimizer_and_its_checkpoint_loads() -> None:
    plain = torch.optim.SGD(metaopt.groups(net(), no_decay="1d"), lr=0.1, weight_decay=0.1)
    opt: Any = metaopt.build(metaopt.groups(net(), no_decay="1d"), "decay(0.1) | sgd(lr=0.1, weight_decay=0.1)")
    with pytest.warns(UserWarning, match="started fresh: decay"):
        opt.load_state_dict(plain.state_dict())
    assert [g["weight_decay"] for g in opt.param_groups] == [0.1, 0.0]
    assert [g["decay.weight_decay"] for g in opt.param_groups] == [0.1, 0.0]
