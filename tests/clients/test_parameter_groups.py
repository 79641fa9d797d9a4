"""Parameter groups as torch's clients use them: added mid-run, empty, named, edited, replaced and rebound."""

import copy
from collections import defaultdict
from typing import Any

import pytest
import torch
from small_runs import assert_same, assert_same_weights, fill_gradients, small_model, train, weights

import metaopt

SPEC = "clip_grad_norm(0.5) | adamw(lr=0.01) | lookahead(k=3)"


def halves(model: torch.nn.Module) -> tuple[list[Any], list[Any]]:
    named = list(model.named_parameters())
    return named[:2], named[2:]


def test_a_group_added_in_mid_run_joins_the_count_and_takes_its_own_hyperparameters() -> None:
    model = small_model()
    first, second = halves(model)
    opt = metaopt.build(first, SPEC)
    train(model, opt, range(4))
    opt.add_param_group({"params": second, "lr": 0.5, "lookahead.k": 1, "lookahead.alpha": 1.0, "name": "head"})
    old, new = opt.param_groups
    assert (new["lr"], new["lookahead.k"], new["lookahead.alpha"]) == (0.5, 1, 1.0)
    assert (old["lr"], old["lookahead.k"], old["lookahead.alpha"]) == (0.01, 3, 0.5)
    assert new["metaopt.updates"] == old["metaopt.updates"] == opt.updates == 4
    assert new["param_names"] == ["2.weight", "2.bias"]
    assert opt.param_groups is opt.base.param_groups
    start = weights(model)[2:]
    train(model, opt, [4])
    # k = 1 and alpha = 1: the slow weights are the fast ones, and they are there from the group's first update on
    for (_, p), before in zip(second, start, strict=True):
        assert not torch.equal(p, before)
        assert_same(opt.state[p]["lookahead.slow"], p.detach())
    assert opt.updates == 5


def test_an_added_group_equals_a_group_that_was_there_from_the_start() -> None:
    model, twin = small_model(), small_model()
    first, second = halves(model)
    opt = metaopt.build(first, SPEC)
    opt.add_param_group({"params": second})
    plain = metaopt.build([{"params": half} for half in halves(twin)], SPEC)
    train(model, opt, range(7))
    train(twin, plain, range(7))
    assert_same_weights(model, twin)


def test_an_added_group_follows_the_schedule_from_where_it_is() -> None:
    model = small_model()
    first, second = halves(model)
    opt = metaopt.build(first, "sgd(lr=cosine(0.1)) | lookahead", total_steps=10)
    train(model, opt, range(4))
    opt.add_param_group({"params": second, "lr_scale": 0.5})
    assert opt.param_groups[1]["lr"] == pytest.approx(0.5 * opt.param_groups[0]["lr"])
    train(model, opt, range(4, 10))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"lookahed.k": 3}, "no part of this stack has 'lookahed.k'"),
        ({"lookahead.k": 0}, "k must be >= 1, got 0"),
        ({"lookahead.k": 2.5}, "k must be int, got 2.5"),
    ],
)
def test_a_refused_group_changes_nothing(group: dict[str, Any], message: str) -> None:
    model = small_model()
    first, second = halves(model)
    opt = metaopt.build(first, SPEC)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(metaopt.HyperparameterError, match=message):
        opt.add_param_group({"params": second, **group})
    assert_same(opt.state_dict(), before)


def test_torch_s_own_refusal_of_a_group_changes_nothing() -> None:
    model = small_model()
    opt = metaopt.build(model.named_parameters(), "adagrad | lookahead")
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": [("again", next(model.parameters()))]})
    assert_same(opt.state_dict(), before)
    assert not opt.state


def test_an_added_group_of_a_base_with_state_from_its_constructor_leaves_the_state_empty() -> None:
    model, twin = small_model(), small_model()
    first, second = halves(model)
    opt = metaopt.build(first, "adagrad(lr=0.1) | lookahead(k=2)")
    opt.add_param_group({"params": second})
    assert not opt.state
    plain = metaopt.build(twin.named_parameters(), "adagrad(lr=0.1) | lookahead(k=2)")
    train(model, opt, range(5))
    train(twin, plain, range(5))
    assert_same_weights(model, twin)


@pytest.mark.parametrize("position", [0, 1])
def test_an_empty_group_is_carried_along(position: int) -> None:
    model, twin = small_model(), small_model()
    groups: list[Any] = [{"params": list(model.parameters())}]
    groups.insert(position, {"params": []})
    opt = metaopt.wrap(torch.optim.AdamW(groups, lr=0.01), "clip_grad_norm(0.5) | lookahead(k=3) | ema(0.9)")
    plain = metaopt.wrap(
        torch.optim.AdamW(twin.parameters(), lr=0.01), "clip_grad_norm(0.5) | lookahead(k=3) | ema(0.9)"
    )
    for step in range(7):
        for m, o in ((model, opt), (twin, plain)):
            fill_gradients(m, step)
            o.step()
    assert_same_weights(model, twin)
    assert [entry["metaopt.updates"] for entry in opt.param_groups] == [7, 7]
    with opt.averaged("ema"):
        pass
    again = metaopt.wrap(
        torch.optim.AdamW(copy.deepcopy(groups), lr=0.01), "clip_grad_norm(0.5) | lookahead(k=3) | ema(0.9)"
    )
    again.load_state_dict(opt.state_dict())


def test_named_parameters_keep_their_names_through_checkpoint_and_copy() -> None:
    model = small_model()
    opt = metaopt.build(model.named_parameters(), SPEC)
    names = [name for name, _ in model.named_parameters()]
    assert opt.param_groups[0]["param_names"] == names
    train(model, opt, range(2))
    assert opt.state_dict()["param_groups"][0]["param_names"] == names
    twin = small_model()
    again = metaopt.build(twin.named_parameters(), SPEC)
    again.load_state_dict(opt.state_dict())
    assert again.param_groups[0]["param_names"] == names
    assert copy.deepcopy(opt).param_groups[0]["param_names"] == names


def test_a_parameter_shared_by_two_modules_is_updated_once() -> None:
    def tied() -> torch.nn.Module:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3))
        model[2].weight = model[0].weight
        return model

    model, twin = tied(), tied()
    opt, bare = (
        metaopt.build(model, "adamw(lr=0.01) | lookahead(k=2, alpha=1.0)"),
        torch.optim.AdamW(twin.parameters(), lr=0.01, fused=True),
    )
    assert sum(len(entry["params"]) for entry in opt.param_groups) == 3
    for step in range(5):
        for m, o in ((model, opt), (twin, bare)):
            o.zero_grad()
            m(torch.randn(4, 3, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            o.step()
    assert model[2].weight is model[0].weight
    assert_same_weights(model, twin)
    copied, other = copy.deepcopy((model, opt))
    assert copied[2].weight is copied[0].weight is other.param_groups[0]["params"][0]


def test_an_edit_of_any_entry_takes_effect_at_the_next_step() -> None:
    model, twin = small_model(), small_model()
    opt = metaopt.wrap(torch.optim.SGD(model.parameters(), lr=0.1), "lookahead(k=2, alpha=0.5)")
    bare = torch.optim.SGD(twin.parameters(), lr=0.1)
    train(model, opt, range(4))
    opt.param_groups[0].update({"lr": 0.03, "momentum": 0.9, "lookahead.alpha": 1.0, "note of a client": [1]})
    twin.load_state_dict(model.state_dict())
    bare.param_groups[0].update(lr=0.03, momentum=0.9)
    train(model, opt, range(4, 9))
    train(twin, bare, range(4, 9))
    assert_same_weights(model, twin)
    assert opt.state_dict()["param_groups"][0]["note of a client"] == [1]


def test_k_may_differ_between_groups_and_change_in_mid_run() -> None:
    x, y = (torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    opt = metaopt.build([{"params": [x], "lookahead.k": 2}, {"params": [y]}], "sgd(lr=1.0) | lookahead(k=3)")
    seen = []
    for step in range(6):
        if step == 4:
            opt.param_groups[1]["lookahead.k"] = 1
        x.grad = y.grad = torch.full((1,), -1.0, dtype=torch.float64)
        opt.step()
        seen.append((x.item(), y.item()))
    assert seen == [(1, 1), (1, 2), (2, 1.5), (2, 2.5), (3, 2.5), (3, 3.0)]


def test_a_client_may_replace_the_parameters_of_a_group() -> None:
    # as Accelerate does for FSDP2: other tensors, same place, before the first update
    model, twin = small_model(), small_model()
    opt = metaopt.build(model.named_parameters(), SPEC)
    late = small_model(1)
    late.load_state_dict(model.state_dict())
    opt.param_groups[0]["params"] = list(late.parameters())
    plain = metaopt.build(twin.named_parameters(), SPEC)
    train(late, opt, range(5))
    train(twin, plain, range(5))
    assert_same_weights(late, twin)
    assert all(p in opt.state for p in late.parameters())


def test_a_client_may_rebind_state_and_groups() -> None:
    # as Optimizer.load_state_dict and ZeRO do
    model, twin = small_model(), small_model()
    opt, plain = metaopt.build(model.named_parameters(), SPEC), metaopt.build(twin.named_parameters(), SPEC)
    train(model, opt, range(4))
    opt.state = defaultdict(dict, {p: dict(held) for p, held in opt.state.items()})
    opt.param_groups = [dict(entry) for entry in opt.param_groups]
    assert opt.base.state is opt.state
    assert opt.base.param_groups is opt.param_groups
    train(model, opt, range(4, 9))
    train(twin, plain, range(9))
    assert_same_weights(model, twin)


def test_a_client_may_write_the_state_of_a_parameter() -> None:
    model, twin = small_model(), small_model()
    opt, plain = metaopt.build(model.named_parameters(), SPEC), metaopt.build(twin.named_parameters(), SPEC)
    train(model, opt, range(4))
    train(twin, plain, range(4))
    # ZeRO loads so: each parameter's dict is replaced by a copy
    for p in model.parameters():
        opt.state[p] = {key: value.clone() for key, value in opt.state[p].items()}
    train(model, opt, range(4, 9))
    train(twin, plain, range(4, 9))
    assert_same_weights(model, twin)


def test_a_client_may_delete_the_state_of_a_parameter_which_then_begins_anew() -> None:
    model = small_model()
    opt = metaopt.build(model.named_parameters(), SPEC)
    train(model, opt, range(4))
    first = next(model.parameters())
    del opt.state[first]
    before = first.detach().clone()
    train(model, opt, [4])
    assert_same(opt.state[first]["lookahead.slow"], before)
    assert opt.state[first]["step"].item() == 1


@pytest.mark.parametrize("steps", [0, 5])
def test_state_of_the_base_alone_that_a_client_writes_gets_the_wrappers_entries(steps: int) -> None:
    # torchtitan registers a pre-hook that fills the moments before Adam's own lazy start
    model = small_model()
    opt = metaopt.build(model.named_parameters(), "adamw(lr=0.01, fused=None) | lookahead(k=3)")
    train(model, opt, range(steps))
    start = weights(model)
    for p in model.parameters():
        opt.state[p] = {
            "step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)
        }  # fmt: skip
    # in mid run it is noticed when the wrapper is due: here at the sixth update, so that the seventh takes the copies
    late = range(steps, steps + 1) if steps else ()
    train(model, opt, late)
    start = weights(model) if steps else start
    train(model, opt, [9])
    for p, before in zip(model.parameters(), start, strict=True):
        assert_same(opt.state[p]["lookahead.slow"], before)


@pytest.mark.parametrize("spec", ["clip_grad_norm(0.5) | lookahead(k=3)", []])
def test_a_group_added_through_the_base_belongs_to_the_stack(spec: Any) -> None:
    model, twin = small_model(), small_model()
    first, second = halves(model)
    base = torch.optim.AdamW(first, lr=0.01)
    opt = metaopt.wrap(base, spec)
    train(model, opt, range(4))
    base.add_param_group({"params": second})
    plain_first, plain_second = halves(twin)
    plain = metaopt.wrap(torch.optim.AdamW(plain_first, lr=0.01), spec)
    train(twin, plain, range(4))
    plain.add_param_group({"params": plain_second})
    train(model, opt, range(4, 9))
    train(twin, plain, range(4, 9))
    assert_same_weights(model, twin)
    assert_same(opt.state_dict(), plain.state_dict())


def test_what_is_loaded_into_the_base_alone_is_a_bare_checkpoint() -> None:
    model, twin = small_model(), small_model()
    base, bare = torch.optim.AdamW(model.parameters(), lr=0.01), torch.optim.AdamW(twin.parameters(), lr=0.5)
    opt = metaopt.wrap(base, "lookahead(k=100)")
    train(model, opt, range(4))
    train(twin, bare, range(4))
    base.load_state_dict(copy.deepcopy(bare.state_dict()))
    model.load_state_dict(twin.state_dict())
    assert opt.updates == 0
    with opt.averaged():
        pass
    train(model, opt, range(4, 9))
    train(twin, bare, range(4, 9))
    assert_same_weights(model, twin)
    assert opt.updates == 5


def test_groups_may_be_split_under_a_schedule() -> None:
    model, twin = small_model(), small_model()
    opt, plain = (metaopt.build(m, "sgd(lr=cosine(0.1)) | lookahead(k=3)", total_steps=10) for m in (model, twin))
    train(model, opt, range(4))
    (entry,) = opt.param_groups
    halved = ({key: entry[key][part] for key in ("params", "param_names")} for part in (slice(2), slice(2, None)))
    opt.param_groups = [{**entry, **half} for half in halved]
    train(model, opt, range(4, 9))
    train(twin, plain, range(9))
    assert_same_weights(model, twin)


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf"), "half", True, None])
def test_a_scale_of_the_rate_that_is_no_factor_is_refused(scale: Any) -> None:
    with pytest.raises(metaopt.HyperparameterError, match="group head sets lr_scale"):
        metaopt.build([{"params": small_model().parameters(), "name": "head", "lr_scale": scale}], "sgd(lr=0.1)")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (lambda model: metaopt.groups(list(model.parameters())), "takes a module"),
        (lambda model: metaopt.groups(model, {"*": 3}), "a dict of dicts"),
        (lambda model: metaopt.groups(model, ["*"]), "a dict of dicts"),
    ],
)
def test_groups_of_something_else_are_refused(given: Any, told: str) -> None:
    with pytest.raises(metaopt.ParameterError, match=told):
        given(small_model())


@pytest.mark.parametrize("added", [[{"params": 2}], [{"params": 1}, {"params": 1, "lr": 0.5}]], ids=["one", "two"])
def test_a_group_without_names_joins_a_stack_built_from_a_model(added: list[dict[str, Any]]) -> None:
    # as Lightning's BaseFinetuning adds what it unfreezes; the user of `build(model)` gave no names
    head = torch.nn.Linear(3, 2)
    opt = metaopt.build(small_model(), SPEC)
    members = iter(head.parameters())
    for group in added:
        opt.add_param_group({**group, "params": [next(members) for _ in range(group["params"])]})
    for p in head.parameters():
        p.grad = torch.ones_like(p)
    before = weights(head)
    opt.step()
    assert all(not torch.equal(p, old) for p, old in zip(head.parameters(), before, strict=True))
    names = [name for entry in opt.param_groups for name in entry["param_names"]]
    assert len(set(names)) == len(names) == 6
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def test_stale_names_of_a_split_group_are_no_reason_to_refuse_it() -> None:
    model, twin = small_model(), small_model()
    opt, plain = metaopt.build(model, SPEC), metaopt.build(twin, SPEC)
    (entry,) = opt.param_groups
    # the names of the whole group stay behind in both halves, as torch allows
    opt.param_groups = [{**entry, "params": entry["params"][half]} for half in (slice(2), slice(2, None))]
    train(model, opt, range(5))
    train(twin, plain, range(5))
    copied, its = copy.deepcopy((model, opt))
    for m, o in ((model, opt), (copied, its), (twin, plain)):
        train(m, o, range(5, 8))
        assert_same_weights(m, model)


def test_parameters_may_leave_a_group_that_has_names() -> None:
    model = small_model()
    opt = metaopt.build(model, SPEC)
    left = opt.param_groups[0]["params"].pop()
    before = left.detach().clone()
    train(model, opt, range(4))
    assert opt.updates == 4 and torch.equal(left.detach(), before)


@pytest.mark.parametrize("late", ["added", "converted"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.bfloat16])
@pytest.mark.parametrize("base", ["sgd(lr=0.1)", "sgd(lr=0.1, momentum=0.9)", "adamw(lr=0.1)"])
def test_a_kernel_that_the_stack_chose_is_given_up_for_parameters_that_it_cannot_update(
    base: str, dtype: torch.dtype, late: str
) -> None:
    # fused kernels refuse complex numbers, and torch 2.13's SGD leaves whole vectors of 16-bit weights unmoved on a CPU
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(130))
    opt = metaopt.build([first, second] if late == "converted" else [first], f"{base} | lookahead(k=2)")
    assert opt.param_groups[0]["fused"]
    if late == "added":
        second = torch.nn.Parameter(second.detach().to(dtype))
        first.grad = torch.ones_like(first)
        opt.step()
        opt.add_param_group({"params": [second]})
    else:
        second.data = second.data.to(dtype)
    for _ in range(2):
        first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
        opt.step()
    assert (second.detach().real < 1).all()


@pytest.mark.parametrize("group", [{}, {"lr": 0.1}, [torch.nn.Parameter(torch.ones(1))], None])
def test_what_is_no_group_is_refused_by_name(group: Any) -> None:
    opt = metaopt.build(small_model(), SPEC)
    with pytest.raises(metaopt.ParameterError, match="a dict with the key 'params'"):
        opt.add_param_group(group)
    assert len(opt.param_groups) == 1
