"""Parameters are matched by name if both sides have names, by position only otherwise, and never silently wrongly."""

import copy
from typing import Any

import pytest
import torch
from small_runs import assert_same, everything

import metaopt

SPEC = "clip_grad_norm(1.0) | adamw(lr=0.01, weight_decay=0.1) | lookahead(k=3) | ema(0.9)"


class Net(torch.nn.Module):
    """Layers of equal shapes, so that a mistake in the order does not show in the shapes."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in names})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = x + layer(x).tanh()
        return x


def net(*names: str, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(*names)


def train(model: torch.nn.Module, opt: torch.optim.Optimizer, steps: int = 4) -> None:
    for step in range(steps):
        opt.zero_grad()
        model(torch.cos(torch.arange(6.0) + step).reshape(2, 3)).square().sum().backward()
        opt.step()


def saved_by(model: torch.nn.Module, params: Any = None, spec: str = SPEC) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train and return the checkpoint and, by name, the state of every parameter."""
    opt = metaopt.build(model if params is None else params, spec)
    train(model, opt)
    state = {name: opt.state[p] for name, p in model.named_parameters() if p in opt.state}
    return copy.deepcopy(opt.state_dict()), copy.deepcopy(state)


def assert_loaded(model: torch.nn.Module, opt: metaopt.Stack, state: dict[str, Any], names: Any = None) -> None:
    for name, p in model.named_parameters():
        if names is None or name in names:
            assert_same(dict(opt.state[p]), state[name], name)


def test_another_order_of_the_same_parameters_brings_each_its_own_state() -> None:
    model = net("a", "b", "c")
    saved, state = saved_by(model)
    twin = net("c", "a", "b")
    opt = metaopt.build(twin, SPEC)
    opt.load_state_dict(copy.deepcopy(saved))  # torch does not copy tensors at load
    assert opt.load_report.matched == "names"
    assert_loaded(twin, opt, state)
    twin.load_state_dict(model.state_dict())
    again = metaopt.build(model, SPEC)
    again.load_state_dict(saved)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for p in twin.parameters():
        p.grad = torch.ones_like(p)
    again.step()
    opt.step()
    for name, p in twin.named_parameters():  # the sum of a norm depends on the order in its last digit
        torch.testing.assert_close(p, dict(model.named_parameters())[name], rtol=1e-6, atol=1e-7)


def test_state_arrives_if_one_group_becomes_two_and_the_groups_keep_their_own_decay() -> None:
    model = net("a", "b")
    saved, state = saved_by(model)
    opt = metaopt.build(metaopt.groups(model, no_decay="1d"), SPEC)
    with pytest.warns(UserWarning, match=r"kept as this stack has it: weight_decay=0 \(checkpoint: 0.1\)"):
        opt.load_state_dict(saved)
    assert [group["weight_decay"] for group in opt.param_groups] == [0.1, 0.0]
    assert_loaded(model, opt, state)
    assert opt.updates == 4
    train(model, opt)


def test_a_value_that_all_groups_share_is_the_checkpoint_s_though_the_groups_are_others() -> None:
    model = net("a", "b")
    saved, _ = saved_by(model)
    opt = metaopt.build(metaopt.groups(model, no_decay="1d"), SPEC.replace("lr=0.01", "lr=0.5").replace("k=3", "k=9"))
    with pytest.warns(UserWarning, match=r"from the checkpoint: lookahead.k=3 \(this stack: 9\), lr=0.01"):
        opt.load_state_dict(saved)
    assert {(group["lr"], group["lookahead.k"]) for group in opt.param_groups} == {(0.01, 3)}


def test_state_arrives_if_two_groups_become_one() -> None:
    model = net("a", "b")
    saved, state = saved_by(model, metaopt.groups(model, no_decay="1d"))
    opt = metaopt.build(model.named_parameters(), SPEC)
    with pytest.warns(UserWarning, match=r"weight_decay=0.1 \(checkpoint: 0\)"):
        opt.load_state_dict(saved)
    assert opt.param_groups[0]["weight_decay"] == 0.1
    assert_loaded(model, opt, state)
    train(model, opt)


def test_groups_in_another_order_keep_their_names_and_values() -> None:
    model = net("a", "b")
    parts = metaopt.groups(model, {"*.a.*": {"lr_scale": 0.1}, "*.b.*": {"weight_decay": 0.0}})
    saved, state = saved_by(model, parts)
    opt = metaopt.build(metaopt.groups(model, {"*.b.*": {"weight_decay": 0.0}, "*.a.*": {"lr_scale": 0.1}}), SPEC)
    opt.load_state_dict(saved)
    assert [group["name"] for group in opt.param_groups] == ["*.b.*", "*.a.*"]
    assert [group["lr"] for group in opt.param_groups] == [0.01, 0.001]
    assert [group["weight_decay"] for group in opt.param_groups] == [0.0, 0.1]
    assert_loaded(model, opt, state)


def test_a_layer_that_was_added_starts_fresh_and_is_named() -> None:
    model = net("a", "b")
    saved, state = saved_by(model)
    larger = net("new", "a", "b")
    opt = metaopt.build(larger, SPEC)
    with pytest.warns(UserWarning, match=r"start fresh: layers\.new\.weight, layers\.new\.bias"):
        opt.load_state_dict(saved)
    assert opt.load_report.new == ["layers.new.weight", "layers.new.bias"]
    assert_loaded(larger, opt, state, state)
    assert larger.layers["new"].weight not in opt.state
    before = larger.layers["new"].weight.detach().clone()
    train(larger, opt, 1)
    fresh = opt.state[larger.layers["new"].weight]
    assert fresh["step"] == 1
    assert_same(fresh["lookahead.slow"], before)
    assert opt.updates == 5
    opt.state_dict()


def test_a_layer_that_was_removed_is_named_and_its_state_is_not_kept() -> None:
    model = net("a", "b", "c")
    saved, state = saved_by(model)
    smaller = net("c", "a")
    opt = metaopt.build(smaller, SPEC)
    with pytest.warns(UserWarning, match=r"this stack does not have: layers\.b\.weight, layers\.b\.bias"):
        opt.load_state_dict(saved)
    assert opt.load_report.gone == ["layers.b.weight", "layers.b.bias"]
    assert_loaded(smaller, opt, state)
    assert len(opt.state) == 4
    train(smaller, opt)


def test_a_backbone_is_frozen_and_unfrozen_later() -> None:
    model = net("backbone", "head")
    model.layers["backbone"].requires_grad_(False)
    saved, state = saved_by(model)
    model.layers["backbone"].requires_grad_(True)
    whole = metaopt.build(model, SPEC)
    with pytest.warns(UserWarning, match="start fresh: layers.backbone.weight"):
        whole.load_state_dict(saved)
    assert_loaded(model, whole, state, state)
    train(model, whole)
    later = copy.deepcopy(whole.state_dict())
    model.layers["backbone"].requires_grad_(False)
    head = metaopt.build(model, SPEC)
    with pytest.warns(UserWarning, match="this stack does not have: layers.backbone.weight"):
        head.load_state_dict(later)
    assert_same(dict(head.state[model.layers["head"].weight]), dict(whole.state[model.layers["head"].weight]))
    assert head.updates == 8


class LowRank(torch.nn.Module):
    """A layer with an addition of low rank, under the names that peft gives."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = torch.nn.Linear(3, 2, bias=False)
        self.lora_B = torch.nn.Linear(2, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_a_low_rank_addition_starts_fresh_and_the_layer_inside_keeps_its_state() -> None:
    model = net("a", "b")
    saved, state = saved_by(model)
    model.layers["a"] = LowRank(model.layers["a"])
    opt = metaopt.build(model, SPEC)
    with pytest.warns(UserWarning, match=r"start fresh: layers\.a\.lora_A\.weight, layers\.a\.lora_B\.weight"):
        opt.load_state_dict(saved)
    assert_same(dict(opt.state[model.layers["a"].base_layer.weight]), state["layers.a.weight"])
    train(model, opt)


class Around(torch.nn.Module):
    def __init__(self, name: str, inner: torch.nn.Module) -> None:
        super().__init__()
        self.add_module(name, inner)


@pytest.mark.parametrize("name", ["module", "_orig_mod", "_fsdp_wrapped_module", "model", "net.inner"])
@pytest.mark.parametrize("wrapped_now", [False, True])
def test_what_a_client_puts_around_a_model_does_not_matter(name: str, wrapped_now: bool) -> None:
    def around(model: torch.nn.Module) -> torch.nn.Module:
        for word in reversed(name.split(".")):
            model = Around(word, model)
        return model

    model, twin = net("a", "b"), net("b", "a")
    opt = metaopt.build(model if wrapped_now else around(model), SPEC)
    train(model, opt)
    again = metaopt.build(around(twin) if wrapped_now else twin, SPEC)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert not again.load_report.new
    assert not again.load_report.gone
    assert_same(dict(again.state[twin.layers["a"].weight]), dict(opt.state[model.layers["a"].weight]))


def test_a_model_without_a_common_name_is_refused_and_named_on_both_sides() -> None:
    saved, _ = saved_by(net("a", "b"))
    other = net("c", "d")
    opt = metaopt.build(other, SPEC)
    before = everything(other, opt)
    with pytest.raises(metaopt.CheckpointError, match=r"layers\.a\.weight.*layers\.c\.weight"):
        opt.load_state_dict(saved)
    assert_same(everything(other, opt), before)
    opt.load_state_dict(saved, names=other.named_parameters())
    assert not opt.load_report.gone


def test_another_shape_under_the_same_name_is_refused_by_name() -> None:
    saved, _ = saved_by(net("a", "b"))
    other = net("a", "b")
    other.layers["b"] = torch.nn.Linear(3, 5)
    opt = metaopt.build(other, SPEC)
    before = everything(other, opt)
    with pytest.raises(
        metaopt.CheckpointError, match=r"layers\.b\.weight has shape \(3, 3\), the parameter has \(5, 3\)"
    ):
        opt.load_state_dict(saved)
    assert_same(everything(other, opt), before)


# ---- without names on one side


def test_without_names_positions_count_and_the_report_says_so() -> None:
    model = net("a", "b")
    saved, _ = saved_by(model, list(model.parameters()))
    opt = metaopt.build(net("a", "b", seed=1).parameters(), SPEC)
    opt.load_state_dict(saved)
    assert opt.load_report.matched == "positions"
    assert [int(held["step"]) for held in opt.state.values()] == [4] * 4


@pytest.mark.parametrize("side", ["checkpoint", "stack", "both"])
def test_other_groups_without_names_are_refused_and_the_way_out_is_named(side: str) -> None:
    model = net("a", "b")
    saved, _ = saved_by(model, list(model.parameters()) if side != "stack" else None)
    groups: Any = metaopt.groups(model, no_decay="1d")
    if side != "checkpoint":
        groups = [{"params": group["params"]} for group in groups]
    opt = metaopt.build(groups, SPEC)
    before = everything(model, opt)
    lacking = "the checkpoint" if side == "checkpoint" else "this stack"
    with pytest.raises(metaopt.CheckpointError, match=rf"{lacking} has none: .*names=\[\.\.\.\]"):
        opt.load_state_dict(saved)
    assert_same(everything(model, opt), before)


def test_names_can_be_given_for_a_bare_checkpoint_that_goes_into_other_groups() -> None:
    model = net("a", "b")
    plain = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    train(model, plain)
    opt = metaopt.build(metaopt.groups(model, no_decay="1d"), "adamw(lr=0.01, weight_decay=0.1)")
    with pytest.warns(UserWarning, match="weight_decay=0"):
        opt.load_state_dict(copy.deepcopy(plain.state_dict()), names=model.named_parameters())
    for p in model.parameters():
        assert_same(opt.state[p]["exp_avg"], plain.state[p]["exp_avg"])
    assert opt.updates == 4


@pytest.mark.parametrize("names", [["a"], ["a", "a", "b", "c"], []])
def test_names_that_do_not_fit_are_refused(names: list[str]) -> None:
    model = net("a", "b")
    opt = metaopt.build(model, SPEC)
    with pytest.raises(metaopt.CheckpointError, match="one name for each"):
        opt.load_state_dict(saved_by(net("a", "b"))[0], names=names)
    with pytest.raises(metaopt.CheckpointError, match="have no names"):
        metaopt.build(model.parameters(), SPEC).load_state_dict(saved_by(net("a", "b"))[0], names=["a", "b", "c", "d"])
    with pytest.raises(metaopt.CheckpointError, match="a list of names"):
        opt.load_state_dict(saved_by(net("a", "b"))[0], names="abcd")


def test_a_checkpoint_whose_state_is_under_names_is_matched_by_them() -> None:
    model = net("a", "b")
    saved, state = saved_by(model)
    named = [name for name, _ in model.named_parameters()]
    (group,) = saved["param_groups"]
    del group["param_names"]
    under_names = {
        "state": {named[i]: held for i, held in saved["state"].items()},
        "param_groups": [{**group, "params": named}],
    }
    twin = net("b", "a")
    opt = metaopt.build(twin, SPEC)
    opt.load_state_dict(under_names)
    assert_loaded(twin, opt, state)


# ---- bases whose state is not one parameter's alone


def test_a_base_with_one_vector_over_all_parameters_is_refused_for_others() -> None:
    model = net("a", "b")
    opt = metaopt.build(model, "lbfgs(lr=0.1)")

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = model(torch.ones(2, 3)).square().sum()
        loss.backward()
        return loss

    opt.step(closure)
    other = metaopt.build(net("b", "a"), "lbfgs(lr=0.1)")
    with pytest.raises(metaopt.CheckpointError, match="LBFGS is one vector over all parameters"):
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
    same = metaopt.build(net("a", "b"), "lbfgs(lr=0.1)")
    same.load_state_dict(copy.deepcopy(opt.state_dict()))


def test_parts_keep_their_parameters_and_a_move_to_another_part_is_refused() -> None:
    spec = "partition({'*.weight': sgd(lr=0.1, momentum=0.9) | lookahead(k=2), '*': adamw}) | ema(0.9)"
    model = net("a", "b")
    opt = metaopt.build(model, spec)
    train(model, opt)
    twin = net("b", "new", "a")
    again = metaopt.build(twin, spec)
    with pytest.warns(UserWarning, match="start fresh: layers.new.weight, layers.new.bias"):
        again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for name in ("a", "b"):
        for kind in ("weight", "bias"):
            found, expected = (getattr(m.layers[name], kind) for m in (twin, model))
            assert_same(dict(again.state[found]), dict(opt.state[expected]))
    train(twin, again)
    moved = metaopt.build(net("a", "b"), spec.replace("*.weight", "*.a.*"))
    with pytest.raises(metaopt.CheckpointError, match="part"):
        moved.load_state_dict(copy.deepcopy(opt.state_dict()))


def test_numbers_of_the_whole_run_are_one_for_all_groups_again() -> None:
    spec = "zclip | adamw(lr=0.01) | mechanic"
    model = net("a", "b")
    opt = metaopt.build(model, spec)
    train(model, opt, 6)
    groups = metaopt.groups(model, {"*.a.*": {}})
    again = metaopt.build(groups, spec)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    (saved,) = opt.param_groups
    for key, value in saved.items():
        if isinstance(value, torch.Tensor):
            for group in again.param_groups:
                assert_same(group[key], value, key)
    train(model, again)


def test_a_number_that_a_base_keeps_for_each_group_is_not_mixed() -> None:
    prodigy = pytest.importorskip("pytorch_optimizer").Prodigy
    model = net("a", "b")
    groups = [{"params": list(model.layers[name].named_parameters(prefix=name))} for name in ("a", "b")]
    opt = metaopt.wrap(prodigy(groups), "ema(0.9)")
    train(model, opt)
    opt.param_groups[1]["d"] = 0.5
    one = metaopt.wrap(
        prodigy([pair for name in "ab" for pair in model.layers[name].named_parameters(name)]), "ema(0.9)"
    )
    with pytest.raises(metaopt.CheckpointError, match="different d, which is state of Prodigy"):
        one.load_state_dict(copy.deepcopy(opt.state_dict()))
