"""Loading never applies half: whatever is wrong with a checkpoint, the stack stays what it was, exactly."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_runs import assert_same, assert_same_weights, everything, small_model, train

import metaopt

SPEC = "clip_grad_norm(0.5) | adamw(lr=cosine(0.01)) | lookahead(k=3) | ema(0.9)"
Damage = Callable[[dict[str, Any]], Any]


def made(spec: str = SPEC, total_steps: int = 20) -> tuple[torch.nn.Module, metaopt.Stack]:
    model = small_model()
    first, *others = model.named_parameters()
    groups = [{"params": [first]}, {"params": others, "lookahead.alpha": 0.8}]
    return model, metaopt.build(groups, spec, total_steps=total_steps)


def saved_by(spec: str = SPEC, total_steps: int = 20, steps: int = 5) -> dict[str, Any]:
    model, opt = made(spec, total_steps)
    train(model, opt, range(10, 10 + steps))
    return copy.deepcopy(opt.state_dict())


def without(key: str) -> Damage:
    return lambda state: state.pop(key)


def group_without(key: str) -> Damage:
    return lambda state: state["param_groups"][1].pop(key)


def entry_of(i: int, key: str, value: Any) -> Damage:
    return lambda state: state["state"][i].__setitem__(key, value)


def replaced(key: str, value: Any, group: int = 0) -> Damage:
    return lambda state: state["param_groups"][group].__setitem__(key, value)


DAMAGES: dict[str, Damage] = {
    "no state": without("state"),
    "no groups": without("param_groups"),
    "a group too many": lambda state: state["param_groups"].append(copy.deepcopy(state["param_groups"][0])),
    "a parameter too few": lambda state: state["param_groups"][1]["params"].pop(),
    "no list of parameters": group_without("params"),
    "groups that are no dicts": lambda state: state.__setitem__("param_groups", [1, 2]),
    "state that is no dict": lambda state: state.__setitem__("state", [1, 2]),
    "state of a parameter that is no dict": lambda state: state["state"].__setitem__(1, 3),
    "a moment of another shape": entry_of(0, "exp_avg", torch.zeros(7, 5)),
    "a moment of another rank": entry_of(0, "exp_avg_sq", torch.zeros(12)),
    "slow weights of another shape": entry_of(2, "lookahead.slow", torch.zeros(9, 4)),
    "slow weights of another shape, last": entry_of(3, "ema.average", torch.zeros(3)),
    "slow weights that are no tensor": entry_of(1, "lookahead.slow", 1.0),
    "a k out of bounds": replaced("lookahead.k", 0),
    "an alpha of no type": replaced("lookahead.alpha", "half", group=1),
    "another length of the run": replaced("metaopt.total_steps", 21),
    "a count that is no number": replaced("metaopt.updates", "five"),
    "a count that is no number, of another length": lambda state: state["param_groups"][0].update(
        {"metaopt.updates": "five", "metaopt.total_steps": 21}
    ),
    "groups that count apart": replaced("metaopt.updates", 4, group=1),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("steps", [0, 4])
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(damage: Damage, steps: int) -> None:
    model, opt = made()
    twin, plain = made()
    train(model, opt, range(steps))
    train(twin, plain, range(steps))
    state = saved_by()
    damage(state)
    before = everything(model, opt)
    groups, held = opt.param_groups, opt.state
    entries = list(groups)
    with pytest.raises(metaopt.CheckpointError):
        opt.load_state_dict(state)
    assert_same(everything(model, opt), before)
    assert opt.param_groups is groups
    assert opt.state is held
    assert all(a is b for a, b in zip(opt.param_groups, entries, strict=True))
    assert opt.load_report is None
    train(model, opt, range(steps, steps + 4))
    train(twin, plain, range(steps, steps + 4))
    assert_same_weights(model, twin)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("sgd(lr=cosine(0.1), momentum=0.9) | lookahead(k=3)", "another base"),
        ("adagrad(lr=cosine(0.1)) | lookahead(k=3)", "another base"),
        ("muon(lr=cosine(0.1))", "another base"),
        ("rmsprop(lr=cosine(0.1))", "another base"),
    ],
)
def test_another_base_s_checkpoint_is_refused_by_name(other: str, message: str) -> None:
    model, opt = made()
    train(model, opt, range(4))
    if "muon" in other:
        matrices = [p for p in small_model().parameters() if p.dim() == 2]
        foreign = torch.optim.Muon([{"params": matrices[:1]}, {"params": matrices[1:]}], lr=0.1).state_dict()
        foreign["param_groups"][1]["params"] = [1, 2, 3]
    else:
        model_of_another_base = small_model()
        first, *others = model_of_another_base.named_parameters()
        other_opt = metaopt.build([{"params": [first]}, {"params": others}], other, total_steps=20)
        train(model_of_another_base, other_opt, range(5))
        foreign = other_opt.state_dict()
    before = everything(model, opt)
    with pytest.raises(metaopt.CheckpointError, match=message):
        opt.load_state_dict(foreign)
    assert_same(everything(model, opt), before)


def test_the_two_lengths_of_the_run_are_both_named() -> None:
    _, opt = made()
    with pytest.raises(metaopt.CheckpointError, match=r"total_steps=33.*total_steps=20"):
        opt.load_state_dict(saved_by(total_steps=33))


def test_a_base_whose_own_load_fails_half_way_leaves_the_stack_as_it_was() -> None:
    class Refuses(torch.optim.AdamW):
        def __setstate__(self, state: dict[str, Any]) -> None:
            super().__setstate__(state)
            raise OSError("no room left")

    model = small_model()
    opt = metaopt.wrap(Refuses(model.parameters(), lr=0.01), "lookahead(k=3)")
    train(model, opt, range(4))
    before = everything(model, opt)
    with pytest.raises(OSError, match="no room left"):
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert_same(everything(model, opt), before)
    train(model, opt, range(4, 6))


def test_a_load_pre_hook_that_raises_changes_nothing() -> None:
    model, opt = made()
    train(model, opt, range(4))
    before = everything(model, opt)

    def refuse(opt: Any, state: dict[str, Any]) -> None:
        raise ValueError("not this one")

    handle = opt.register_load_state_dict_pre_hook(refuse)
    with pytest.raises(ValueError, match="not this one"):
        opt.load_state_dict(saved_by())
    handle.remove()
    assert_same(everything(model, opt), before)


@pytest.mark.filterwarnings("error")
def test_a_warning_made_an_error_comes_when_everything_is_loaded() -> None:
    model, opt = made("adamw(lr=cosine(0.01)) | lookahead(k=3)")
    state = saved_by()
    with pytest.raises(UserWarning, match="dropped: clip_grad_norm, ema"):
        opt.load_state_dict(state)
    assert opt.updates == 5
    assert opt.load_report is not None
    train(model, opt, range(3))


def test_the_dict_that_was_loaded_is_left_as_it_was() -> None:
    _, opt = made()
    state = saved_by()
    kept = copy.deepcopy(state)
    opt.load_state_dict(state)
    assert_same(state, kept)
    train(*made(), range(1))


def test_a_checkpoint_loaded_into_two_stacks_is_not_shared_by_the_wrappers() -> None:
    state = saved_by()
    (a_model, a), (b_model, b) = made(), made()
    a.load_state_dict(copy.deepcopy(state))
    b.load_state_dict(copy.deepcopy(state))
    train(a_model, a, range(3))
    for q in b_model.parameters():
        i = next(i for i, p in enumerate(b_model.parameters()) if p is q)
        assert_same(b.state[q]["lookahead.slow"], state["state"][i]["lookahead.slow"])
