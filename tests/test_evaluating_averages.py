"""Evaluating on an average at any moment: everything comes back exactly, or a copy shares nothing."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

import metaopt

SPEC = "sgd(lr=0.1) | ema(decay=0.9)"


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def batch(step: int) -> torch.Tensor:
    return torch.randn(64, 3, generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, step: int = 0) -> torch.Tensor:
    return (model(batch(step)) - 1).square().mean()


def train(model: nn.Module, opt: torch.optim.Optimizer, first: int = 0, last: int = 5) -> None:
    for step in range(first, last):
        opt.zero_grad()
        loss_of(model, step).backward()
        opt.step()


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Computes(metaopt.Wrapper):
    """Shows what it works out, and can do so once only."""

    asked = 0

    def averaged(self, group: metaopt.Group) -> list[torch.Tensor]:
        type(self).asked += 1
        if self.asked > 1:
            raise MemoryError("no room for a second one")
        return [p * 2 for p in group.params]


def test_weights_return_without_asking_for_the_average_again() -> None:
    model = network()
    opt = metaopt.build(model, metaopt.sgd(lr=0.1) | Computes())
    train(model, opt)
    before = tensors(model)
    with opt.averaged():
        assert torch.equal(model[0].weight, before["0.weight"] * 2)
    assert_same(tensors(model), before)


# ---- buffers


@pytest.mark.parametrize("over", ["model", "groups", "parameters"])
def test_statistics_that_were_made_for_an_average_do_not_stay(over: str) -> None:
    model = network()
    given = {"model": model, "groups": metaopt.groups(model, no_decay="1d"), "parameters": model.parameters()}[over]
    opt = metaopt.build(given, SPEC)
    train(model, opt)
    before = tensors(model)
    with opt.averaged(model=model if over == "parameters" else None):
        update_bn([batch(0)], model)
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
        model[1].num_batches_tracked = torch.tensor(7)
        model[1].running_var.data = torch.zeros(4)
    assert_same(tensors(model), before)


def test_buffers_that_are_not_saved_come_back_too() -> None:
    model = network()
    model.register_buffer("seen", torch.zeros(2), persistent=False)
    opt = metaopt.build(model, SPEC)
    train(model, opt)
    seen = model.seen
    with opt.averaged():
        model.seen = torch.ones(2)
    assert model.seen is seen
    assert seen.tolist() == [0.0, 0.0]


def test_a_stack_does_not_keep_its_model_alive_and_copies_of_it_know_no_model() -> None:
    model = network()
    opt = metaopt.build(metaopt.groups(model), SPEC)
    train(model, opt)
    twin = pickle.loads(pickle.dumps(opt))
    with twin.averaged():  # whose model nobody knows: its parameters are shown
        pass
    with pytest.raises(metaopt.StepError, match=r"averaged_module\(model\)"):
        twin.averaged_module()
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    with opt.averaged():
        pass


# ---- in the middle of a step


@pytest.mark.parametrize("part", ["ema(decay=0.9)", "lookahead(k=2)", "gpa"])
def test_an_evaluation_between_forward_and_backward_changes_no_gradient(part: str) -> None:
    model = network()
    opt = metaopt.build(model, f"sgd(lr=0.1) | {part}")
    train(model, opt)
    state = copy.deepcopy(model.state_dict())
    opt.zero_grad()
    loss_of(model).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.load_state_dict(state)
    opt.zero_grad()
    loss = loss_of(model)
    with opt.averaged(), torch.no_grad():
        model.eval()
        model(batch(9))
        model.train()
    loss.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected, rtol=0, atol=0)


def test_a_forward_pass_over_an_average_may_not_go_backward_over_the_weights() -> None:
    model = network()
    opt = metaopt.build(model, SPEC)
    train(model, opt)
    with opt.averaged():
        inside = loss_of(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        inside.backward()


def test_weights_of_a_checkpoint_that_is_loaded_inside_are_new_to_autograd() -> None:
    model = network()
    opt = metaopt.build(model, SPEC)
    train(model, opt)
    saved = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
    loss = loss_of(model)
    with opt.averaged():
        opt.load_state_dict(saved[0])
        model.load_state_dict(saved[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- a copy


@pytest.mark.parametrize("part", ["ema(decay=0.9)", "lookahead(k=3)", "gpa", "lawa(k=1, n=2)"])
def test_a_copy_holds_what_averaged_shows_and_shares_nothing(part: str) -> None:
    model = network()
    opt = metaopt.build(model, f"sgd(lr=0.1) | {part}")
    train(model, opt)
    with opt.averaged():
        shown = tensors(model)
    before = tensors(model)
    twin = opt.averaged_module()
    assert_same(tensors(twin), shown)
    assert_same(tensors(model), before)
    memory = {value.untyped_storage().data_ptr() for value in model.state_dict().values()}
    memory |= {v.untyped_storage().data_ptr() for s in opt.state.values() for v in s.values() if torch.is_tensor(v)}
    assert not memory & {value.untyped_storage().data_ptr() for value in twin.state_dict().values()}
    assert not any(p.requires_grad for p in twin.parameters())
    train(model, opt, 5, 8)
    assert_same(tensors(twin), shown)


def test_a_copy_may_be_made_anywhere_in_a_step_and_inside_averaged() -> None:
    model = network()
    opt = metaopt.build(model, SPEC)
    train(model, opt)
    expected = tensors(opt.averaged_module())
    opt.zero_grad()
    model.features = model(batch(0))  # a tensor with a history, which torch refuses to copy
    loss = (model.features - 1).square().mean()
    twin = opt.averaged_module()
    loss.backward()
    assert all(p.grad is None for p in twin.parameters())
    with opt.averaged():
        inside = opt.averaged_module()
    del expected["1.running_mean"], expected["1.running_var"], expected["1.num_batches_tracked"]
    for found in (twin, inside):
        assert_same({name: value for name, value in tensors(found).items() if name in expected}, expected)


def test_a_teacher_is_written_to_in_place() -> None:
    model = network()
    opt = metaopt.build(model, SPEC)
    train(model, opt)
    teacher = opt.averaged_module()
    weight = teacher[0].weight
    train(model, opt, 5, 7)
    assert opt.averaged_module(out=teacher) is teacher
    assert teacher[0].weight is weight
    assert_same(tensors(teacher), tensors(opt.averaged_module()))


def test_a_copy_ties_what_the_model_ties_and_keeps_its_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).eval()
    model[1].weight = model[0].weight
    opt = metaopt.build(model, SPEC)
    model(torch.ones(1, 3)).sum().backward()
    opt.step()
    twin = opt.averaged_module()
    assert twin[0].weight is twin[1].weight
    assert not twin.training


def test_before_the_first_update_a_copy_has_the_weights() -> None:
    model = network()
    assert_same(tensors(metaopt.build(model, SPEC).averaged_module()), tensors(model))


def test_a_copy_of_what_is_not_the_model_is_refused() -> None:
    model = network()
    opt = metaopt.build(model.parameters(), SPEC)
    train(model, opt)
    with pytest.raises(metaopt.StepError, match=r"was not built over a module: give it"):
        opt.averaged_module()
    with pytest.raises(metaopt.ParameterError, match=r"none of the model's parameters is in this stack"):
        opt.averaged_module(network())
    with pytest.raises(metaopt.ParameterError, match=r"out must be an earlier copy"):
        opt.averaged_module(model, out=nn.Linear(3, 4))
    with pytest.raises(metaopt.StepError, match=r"model must be a torch.nn.Module, got generator"):
        opt.averaged_module(model.parameters())
    with pytest.raises(metaopt.StepError, match=r"averaged_module\(\): no part of this stack keeps an average"):
        metaopt.build(model, "sgd").averaged_module()


# ---- several averages


def test_of_several_averages_the_last_one_written_is_the_default_and_each_is_shown_by_name() -> None:
    model = network()
    opt = metaopt.build(model, "sgd(lr=0.1) | lookahead(k=4) | ema(decay=0.9)")
    train(model, opt)
    assert opt.averages == ("lookahead", "ema")
    shown = {}
    for label in (None, *opt.averages):
        with opt.averaged(label):
            shown[label] = tensors(model)
        assert_same(tensors(opt.averaged_module(label=label)), shown[label])
    assert_same(shown[None], shown["ema"])
    assert not torch.equal(shown["lookahead"]["0.weight"], shown["ema"]["0.weight"])
    with opt.averaged("lookahead"), pytest.raises(metaopt.StepError, match=r"leave that one first"):
        opt.averaged_module(label="ema")


def test_bases_with_different_averages_have_no_default() -> None:
    model = network()
    opt = metaopt.build(model, "partition({'*.bias': sgd | lookahead, '*': sgd | ema})")
    train(model, opt)
    with pytest.raises(metaopt.StepError, match=r"keep different averages: name one of lookahead, ema"):
        opt.averaged().__enter__()
    opt = metaopt.build(model, "partition({'*.bias': sgd | lookahead, '*': sgd}) | ema")
    train(model, opt)
    with opt.averaged():
        assert opt.param_groups[0]["metaopt.swapped"] == "ema"


@pytest.mark.parametrize("part", ["ema(decay=0.9, start=2)", "tail_average(start=2)"])
def test_weights_return_whatever_was_changed_while_the_average_was_shown(part: str) -> None:
    model = network()
    opt = metaopt.build(model, f"sgd(lr=0.1) | {part}")
    train(model, opt)
    label = part.split("(")[0]
    weights, average = ([t.clone() for t in of] for of in (model.parameters(), _averages_of(opt, label)))

    def has_returned() -> None:
        assert all(map(torch.equal, model.parameters(), weights))
        assert all(map(torch.equal, _averages_of(opt, label), average))
        assert not any(key.endswith((".shown", ".fast")) for state in opt.state.values() for key in state)

    # nothing is shown at such a start, nor at such a count: the part itself could not say what was swapped
    with opt.averaged():
        for group in opt.param_groups:
            group[f"{label}.start"] = 100
    has_returned()
    for group in opt.param_groups:
        group[f"{label}.start"] = 2
    with opt.averaged():
        saved, shown = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
    opt.load_state_dict(saved)
    model.load_state_dict(shown)
    opt.updates = 0
    opt.zero_grad()
    has_returned()


def _averages_of(opt: metaopt.Stack, label: str) -> list[torch.Tensor]:
    return [opt.state[p][f"{label}.average"] for group in opt.param_groups for p in group["params"]]


@pytest.mark.parametrize("marked", [True, False])
def test_weights_of_several_dtypes_return_after_a_load_from_inside(marked: bool) -> None:
    """Averages in float32 are swapped with weights in float32, and those of weights in bfloat16 are copied."""
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]
    opt = metaopt.build(params, "sgd(lr=0.1) | ema(decay=0.9, average_dtype='float32')")
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
    weights = [p.detach().clone() for p in params]
    with opt.averaged():
        saved, shown = copy.deepcopy(opt.state_dict()), [p.detach().clone() for p in params]
    assert not any(map(torch.equal, weights, shown))
    if not marked:  # as an earlier version wrote it
        for held in saved["state"].values():
            held.pop("ema.shown", None)
    for p, values in zip(params, shown, strict=True):
        p.data.copy_(values)
    opt.load_state_dict(saved)
    opt.zero_grad()
    assert all(map(torch.equal, params, weights))
