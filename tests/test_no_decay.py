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


def by_hand(model: torch.nn.Module) -> list[dict[str, Any]]:
    flat = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": [p for p in model.parameters() if p.dim() > 1]}, {"params": flat, "weight_decay": 0.0}]


def by_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    return metaopt.groups(model, no_decay="1d")


def added(model: torch.nn.Module, spec: str) -> metaopt.Stack:
    full, flat = by_hand(model)
    opt = metaopt.build([full], spec, total_steps=4)
    opt.add_param_group(flat)
    return opt


SCHEDULED = [
    "decay(linear(0.1, 0.2)) | sgd(lr=0.1)",
    "sgd(lr=0.1, weight_decay=linear(0.1, 0.2))",
    "sgd(lr=0.1, weight_decay=linear(0.0, 0.2))",
    "sgd(lr=0.1) | cautious_decay(linear(0.1, 0.2))",
    "l2(0.1) | decay(linear(0.1, 0.2)) | sgd(lr=constant(0.1), weight_decay=cosine(0.4))",
]


@pytest.mark.parametrize("make", [by_groups, by_hand, None])
@pytest.mark.parametrize("spec", SCHEDULED)
def test_a_scheduled_decay_leaves_groups_without_decay_alone(spec: str, make: Any) -> None:
    model = net()
    opt = added(model, spec) if make is None else metaopt.build(make(model), spec, total_steps=4)
    for _ in range(2):
        assert moved(opt, model) <= {"0.weight"}
    assert moved(opt, model) == {"0.weight"}
    first, second = opt.param_groups
    keys = [key for key in first if key.endswith("weight_decay") and first[key] != 0]
    assert keys and all(second[key] == 0.0 for key in keys)
    twin = net()
    again = metaopt.build(by_groups(twin), spec, total_steps=4)
    again.load_state_dict(opt.state_dict())
    assert moved(again, twin) == {"0.weight"}
    driven = [key for key in keys if key in opt.schedules]
    assert [again.param_groups[0][key] for key in driven] == [opt.schedules[key](4, 4) for key in driven]
    assert all(again.param_groups[1][key] == 0.0 for key in keys)
    assert str(again.spec) == str(metaopt.build(net(), spec, total_steps=4).spec)


@pytest.mark.parametrize(
    "spec",
    [
        "decay(0.1) | sgd(lr=0.1)",
        "decay(0.1) | rprop(lr=0.1)",
        "sgd(lr=0.1, weight_decay=0.1) | cautious_decay(0.1)",
        "sgd(lr=0.1) | schedule_free(weight_decay_at_y=0.1)",
    ],
)
def test_groups_made_by_hand_mean_what_those_of_groups_mean(spec: str) -> None:
    for make in (by_groups, by_hand):
        model = net()
        assert moved(metaopt.build(make(model), spec), model) == {"0.weight"}
    model = net()
    assert moved(added(model, spec), model) == {"0.weight"}


def test_a_group_of_a_plain_optimizer_without_its_decay_means_that_too() -> None:
    model = net()
    opt = metaopt.wrap(torch.optim.SGD(by_hand(model), lr=0.1, weight_decay=0.1), "decay(0.1)")
    assert moved(opt, model) == {"0.weight"}


def test_what_is_called_a_decay_and_is_shared_by_all_groups_stays() -> None:
    model = net()
    opt = metaopt.build(by_groups(model), "sgd(lr=1.0) | mechanic(weight_decay=0.01)")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    assert [group["mechanic.weight_decay"] for group in opt.param_groups] == [0.01, 0.01]


def test_the_groups_also_serve_a_plain_optimizer_and_its_checkpoint_loads() -> None:
    plain = torch.optim.SGD(metaopt.groups(net(), no_decay="1d"), lr=0.1, weight_decay=0.1)
    opt: Any = metaopt.build(metaopt.groups(net(), no_decay="1d"), "decay(0.1) | sgd(lr=0.1, weight_decay=0.1)")
    with pytest.warns(UserWarning, match="started fresh: decay"):
        opt.load_state_dict(plain.state_dict())
    assert [g["weight_decay"] for g in opt.param_groups] == [0.1, 0.0]
    assert [g["decay.weight_decay"] for g in opt.param_groups] == [0.1, 0.0]
