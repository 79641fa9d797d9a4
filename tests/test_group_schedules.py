"""Schedules of a group's own beside those of the stack, and rates that are changed in the middle of a scheduled run."""

import copy
import pickle
from typing import Any

import pytest
import torch
from small_runs import assert_same, everything, through_a_file
from torch.optim import lr_scheduler

import metaopt
from metaopt import adamw, constant, cosine, linear, lookahead, sgd, warmup

HEAD, BODY = "head.*", "body.*"


def model() -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"body": torch.nn.Linear(3, 3), "head": torch.nn.Linear(3, 1)})


def train(net: torch.nn.ModuleDict, opt: torch.optim.Optimizer, updates: int) -> list[tuple[Any, ...]]:
    """Train and return the rates of all groups at each update."""
    rates = []
    for step in range(updates):
        rates.append(tuple(group["lr"] for group in opt.param_groups))
        opt.zero_grad()
        net["head"](net["body"](torch.full((2, 3), 0.1 * step))).square().mean().backward()
        opt.step()
    return rates


# ---- a schedule in a group


def test_a_group_may_have_a_schedule_of_its_own() -> None:
    net = model()
    groups = metaopt.groups(net, {BODY: {"lr": warmup(1e-2, 4)}, HEAD: {"lr": 1e-3}})
    opt = metaopt.build(groups, adamw | lookahead(k=2))
    assert train(net, opt, 6) == [(1e-2 * min(t / 4, 1.0), 1e-3) for t in range(6)]


def test_it_takes_the_place_of_the_stack_s() -> None:
    net = model()
    groups = metaopt.groups(net, {BODY: {"lr": constant(0.5), "lr_scale": 0.1}, HEAD: {}})
    opt = metaopt.build(groups, sgd(lr=linear(1.0, 0.0)), total_steps=4)
    assert train(net, opt, 5) == [(0.05, max(0.0, 1 - t / 4)) for t in range(5)]
    assert str(opt.spec) == "sgd(lr=linear(start=1.0, end=0.0))"
    assert [sorted(opt.schedules_of(group)) for group in opt.param_groups] == [["lr"], ["lr"]]
    shown = metaopt.explain(opt)
    assert [(row.rate, row.peak) for row in shown.rows] == [(0.05, 0.05), (0.0, 1.0)]


@pytest.mark.parametrize(
    "entries",
    [
        {"lr": cosine(1e-2)},
        {"lr": lambda t: 1e-2 / (1 + t), "weight_decay": linear(0.0, 0.1)},
        {"betas": (linear(0.95, 0.85), 0.99)},
        {"lookahead.alpha": linear(0.5, 0.9), "decay.weight_decay": 0.3},
    ],
)
def test_it_goes_on_after_a_checkpoint_a_copy_and_a_pickle(entries: dict[str, Any]) -> None:
    def made() -> tuple[torch.nn.ModuleDict, metaopt.Stack]:
        net = model()
        spec = "decay(linear(0.0, 0.1)) | adamw(lr=1e-3) | lookahead(k=2, alpha=linear(0.5, 0.6))"
        return net, metaopt.build(metaopt.groups(net, {BODY: entries}), spec, total_steps=8)

    net, opt = made()
    train(net, opt, 3)
    saved = through_a_file({"net": net.state_dict(), "opt": opt.state_dict()})
    again, resumed = made()
    again.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["opt"])
    pairs = [(again, resumed), copy.deepcopy((net, opt))]
    if not callable(entries.get("lr")):
        pairs.append(pickle.loads(pickle.dumps((net, opt))))
    train(net, opt, 3)
    for twin, other in pairs:
        train(twin, other, 3)
        assert_same(everything(twin, other), everything(net, opt))


def test_a_group_that_is_added_may_bring_one() -> None:
    net = model()
    opt = metaopt.build(net["head"], sgd(lr=linear(1.0, 0.0)), total_steps=4)
    train(net, opt, 2)
    opt.add_param_group({"params": net["body"].parameters(), "lr": linear(0.4, 0.0), "name": "body"})
    assert train(net, opt, 3) == [(0.5, pytest.approx(0.2)), (0.25, pytest.approx(0.1)), (0.0, 0.0)]


def test_the_groups_of_a_plain_optimizer_may_bring_one() -> None:
    net = model()
    plain = torch.optim.SGD(metaopt.groups(net, {BODY: {"lr": linear(1.0, 0.0, steps=4)}}), lr=0.1)
    opt = metaopt.wrap(plain, "lookahead(k=2)")
    assert train(net, opt, 3) == [(1.0, 0.1), (0.75, 0.1), (0.5, 0.1)]


def test_the_spec_of_a_wrapped_optimizer_has_the_schedule_that_was_written() -> None:
    net = model()
    own = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    own.param_groups[0]["lr"] = warmup(cosine(1e-2), 0.5)
    opt = metaopt.wrap(own, "lookahead(k=2)", total_steps=8)
    written = str(opt.spec)
    assert written.startswith("sgd(lr=warmup(schedule=cosine(start=0.01), steps=0.5), momentum=0.9")
    train(net, opt, 3)
    assert str(opt.spec) == written
    again = metaopt.build(model().parameters(), written, total_steps=8)
    assert again.schedules_of(again.param_groups[0]) == opt.schedules_of(opt.param_groups[0])


def test_it_has_the_optimizer_s_own_rate_if_only_some_groups_have_a_schedule() -> None:
    groups = metaopt.groups(model(), {BODY: {"lr": linear(1.0, 0.0, steps=4)}})
    opt = metaopt.wrap(torch.optim.SGD(groups, lr=0.1), "lookahead(k=2)")
    assert str(opt.spec).startswith("sgd(lr=0.1")


def test_the_parts_of_a_partition_may_have_them() -> None:
    net = model()
    spec = "partition({'head.*': sgd(lr=linear(1.0, 0.0)), '*': adamw(lr=cosine(0.1))})"
    opt = metaopt.build(metaopt.groups(net, {BODY: {"lr": constant(0.2)}}), spec, total_steps=2)
    assert {rate for _, rate in train(net, opt, 2)} == {0.2}
    assert [head for head, _ in train(net, opt, 1)] == [0.0]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"lr": 0.1}, r"group body\.\*.*lr=0\.1.*schedule.*lr_scale.*lr=constant\(0\.1\)"),
        ({"clip_grad_norm.max_norm": linear(1.0, 2.0)}, "which all groups share"),
        ({"lookahead.k": linear(1.0, 2.0)}, "takes no schedule"),
        ({"lookahead.alpha": linear(0.5, -1.0)}, r"gives alpha=.* after .* updates, but alpha must be > 0"),
        ({"betas": cosine(0.9)}, "as a whole"),
        ({"lr": warmup(0.1, 9)}, "begins after 9 updates"),
        ({"rate": cosine(0.1)}, "no part of this stack has 'rate'"),
    ],
)
def test_what_a_group_cannot_mean_is_refused(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(metaopt.HyperparameterError, match=message):
        metaopt.build(
            metaopt.groups(model(), {BODY: entries}),
            "clip_grad_norm(1.0) | adamw(lr=cosine(0.1)) | lookahead",
            total_steps=8,
        )


def test_a_group_from_a_checkpoint_whose_schedule_is_nowhere_is_refused() -> None:
    net = model()
    opt = metaopt.build(metaopt.groups(net, {BODY: {"lr": cosine(0.1)}}), "sgd(lr=0.1)", total_steps=8)
    entries = [{**group, "params": list(own["params"])} for group, own in zip(
        copy.deepcopy(opt.state_dict())["param_groups"], opt.param_groups, strict=True)]  # fmt: skip
    bare = metaopt.build(net["head"], "sgd(lr=0.1)", total_steps=8)
    with pytest.raises(metaopt.HyperparameterError, match="schedules of its own, which a checkpoint does not hold"):
        bare.param_groups = entries
        train(net, bare, 1)


# ---- a rate that is changed by hand


def test_a_rate_that_is_lowered_by_hand_scales_the_rest_of_the_schedule() -> None:
    net = model()
    opt = metaopt.build(
        metaopt.groups(net, {BODY: {"lr_scale": 0.5}, HEAD: {}}), sgd(lr=linear(1.0, 0.0)), total_steps=8
    )
    train(net, opt, 2)
    for group in opt.param_groups:
        group["lr"] *= 0.1
    with pytest.warns(metaopt.MetaoptWarning, match=r"opt\.scale_lr"):
        (first,) = train(net, opt, 1)
    assert [first, *train(net, opt, 2)] == [pytest.approx((0.05 * (1 - t / 8), 0.1 * (1 - t / 8))) for t in (2, 3, 4)]


@pytest.mark.parametrize("saved_before_the_step", [True, False])
def test_the_factor_is_in_the_checkpoint(saved_before_the_step: bool) -> None:
    net = model()
    opt = metaopt.build(net, adamw(lr=linear(1.0, 0.0)), total_steps=8)
    train(net, opt, 2)
    opt.param_groups[0]["lr"] = 0.075
    with pytest.warns(metaopt.MetaoptWarning, match="by hand"):
        if not saved_before_the_step:
            train(net, opt, 1)
        saved = through_a_file(opt.state_dict())
    again = metaopt.build(model(), adamw(lr=linear(1.0, 0.0)), total_steps=8)
    again.load_state_dict(saved)
    assert again.param_groups[0]["lr"] == pytest.approx(0.1 * (1 - again.updates / 8))


def test_a_rate_that_is_a_tensor_may_be_changed_in_place() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    base = torch.optim.Adam([p], lr=torch.tensor(1.0))
    opt = metaopt.Stack(base, schedules={"lr": linear(1.0, 0.0, steps=4)})
    p.grad = torch.ones(1)
    opt.step()
    opt.param_groups[0]["lr"].mul_(0.5)
    with pytest.warns(metaopt.MetaoptWarning, match="by hand"):
        opt.step()
    assert float(opt.param_groups[0]["lr"]) == pytest.approx(0.25)


def test_what_sets_the_rate_again_and_again_is_another_driver() -> None:
    net = model()
    opt = metaopt.build(net, sgd(lr=linear(1.0, 0.5)), total_steps=8)
    with pytest.warns(metaopt.MetaoptWarning, match="by hand"), pytest.raises(metaopt.ScheduleConflict):
        for t in range(8):
            opt.param_groups[0]["lr"] = 0.1 * 0.9**t
            train(net, opt, 1)
    assert opt.updates == 2


def test_a_checkpoint_in_between_hides_no_other_driver() -> None:
    net = model()
    opt = metaopt.build(net, sgd(lr=linear(1.0, 0.5)), total_steps=8)
    with pytest.warns(metaopt.MetaoptWarning, match="by hand"), pytest.raises(metaopt.ScheduleConflict):
        for t in range(8):
            opt.param_groups[0]["lr"] = 0.1 * 0.9**t
            opt.state_dict()
            train(net, opt, 1)
    assert opt.updates == 2


@pytest.mark.parametrize("every", [1, 3])
def test_a_torch_scheduler_is_found_at_its_first_change(every: int) -> None:
    net = model()
    opt = metaopt.build(net, sgd(lr=linear(1.0, 0.5)), total_steps=8)
    scheduler = lr_scheduler.StepLR(opt, every)
    with pytest.raises(metaopt.ScheduleConflict, match=r"opt\.scheduler\(\)"):
        for _ in range(8):
            train(net, opt, 1)
            scheduler.step()
    assert opt.updates == every


def test_reducing_on_a_plateau_works_on_a_schedule() -> None:
    net = model()
    opt = metaopt.build(net, sgd(lr=linear(1.0, 0.0)), total_steps=8)
    plateau = lr_scheduler.ReduceLROnPlateau(opt, factor=0.1, patience=1)
    with pytest.warns(metaopt.MetaoptWarning, match="by hand"):
        for _ in range(4):
            train(net, opt, 1)
            plateau.step(1.0)
        assert train(net, opt, 1) == [(pytest.approx(0.1 * (1 - 4 / 8)),)]


def test_at_a_rate_of_zero_there_is_no_proportion_and_the_error_says_what_to_do() -> None:
    net = model()
    opt = metaopt.build(net, sgd(lr=warmup(0.1, 4)), total_steps=8)
    opt.param_groups[0]["lr"] = 0.01
    with pytest.raises(metaopt.ScheduleConflict, match=r"opt\.scale_lr\(factor\)"):
        train(net, opt, 1)


# ---- opt.scale_lr


def test_scale_lr_scales_the_rates_of_all_groups_or_of_one() -> None:
    net = model()
    opt = metaopt.build(
        metaopt.groups(net, {BODY: {}, HEAD: {"lr": constant(0.4)}}), sgd(lr=linear(1.0, 0.0)), total_steps=4
    )
    opt.scale_lr(0.5)
    assert train(net, opt, 2) == [(0.5, 0.2), (0.375, 0.2)]
    opt.scale_lr(0.1, HEAD)
    saved = opt.state_dict()
    assert train(net, opt, 1) == [(0.25, pytest.approx(0.02))]
    opt.load_state_dict(saved)
    assert train(net, opt, 1) == [(0.25, pytest.approx(0.02))]
    plain = metaopt.build(model(), "sgd(lr=0.5)")
    plain.scale_lr(0.1)
    assert plain.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "factor"),
        ((-1.0,), "factor"),
        ((True,), "factor"),
        (("half",), "factor"),
        ((0.5, "haed"), "Did you mean head"),
    ],
)
def test_scale_lr_says_what_it_takes(arguments: tuple[Any, ...], message: str) -> None:
    opt = metaopt.build(metaopt.groups(model(), {HEAD: {"name": "head"}}), "sgd(lr=cosine(0.5))", total_steps=4)
    with pytest.raises(metaopt.MetaoptError, match=message):
        opt.scale_lr(*arguments)
    assert opt.param_groups[0]["lr"] == 0.5


# ---- a group that brings a rate


@pytest.mark.parametrize("how", ["add_param_group", "append", "base"])
def test_the_rate_of_a_group_that_is_added_is_a_proportion_of_the_schedule_s(how: str) -> None:
    net = model()
    opt = metaopt.build(list(net["head"].parameters()), sgd(lr=linear(1.0, 0.0)), total_steps=4)
    train(net, opt, 2)
    group = {"params": list(net["body"].parameters()), "lr": 0.05}
    if how == "append":
        opt.param_groups.append({**opt.defaults, **group})
    else:
        (opt if how == "add_param_group" else opt.base).add_param_group(group)
    train(net, opt, 1)
    assert train(net, opt, 1) == [(0.25, pytest.approx(0.025))]
    assert opt.param_groups[1]["lr"] == 0.0


def test_adding_a_group_keeps_what_was_changed_by_hand() -> None:
    net = model()
    opt = metaopt.build(net["head"], sgd(lr=linear(1.0, 0.0)), total_steps=4)
    train(net, opt, 2)
    opt.param_groups[0]["lr"] *= 0.1
    with pytest.warns(metaopt.MetaoptWarning, match="by hand"):
        opt.add_param_group({"params": net["body"].parameters()})
    assert train(net, opt, 2) == [pytest.approx((0.05, 0.5)), pytest.approx((0.025, 0.25))]


def test_a_rate_beside_a_schedule_that_is_zero_is_refused_with_the_ways_out() -> None:
    net = model()
    opt = metaopt.build(net["head"], sgd(lr=warmup(0.1, 4)))
    with pytest.raises(metaopt.HyperparameterError, match=r"whose rate is 0 now.*lr_scale.*constant"):
        opt.add_param_group({"params": net["body"].parameters(), "lr": 0.05})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("spec", ["adamw(lr=0.1) | lookahead(k=2)", "partition({'*': adamw(lr=0.1)}) | lookahead(k=2)"])
def test_a_group_that_is_refused_leaves_no_trace(spec: str) -> None:
    def ends(updates: int) -> float:
        if updates > 0:
            raise ValueError("no value")
        return 0.1

    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = metaopt.build([("p", p)], spec)
    p.grad = torch.ones(2)
    opt.step()
    for group, error in (
        ({"params": [("q", q)], "lr_scale": -1}, metaopt.HyperparameterError),
        ({"params": [("q", q)], "lookahead.alpha": ends}, ValueError),
    ):
        with pytest.raises(error):
            opt.add_param_group(group)
        assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [("q", q)], "lr_scale": 0.5})
    q.grad = torch.ones(2)
    opt.step()
    assert opt.param_groups[1]["lr"] == pytest.approx(0.05)


@pytest.mark.parametrize(
    "event",
    [lambda opt: opt.reset_state(), lambda opt: opt.reset_state("averages"), copy.deepcopy],
    ids=["reset", "averages", "copy"],
)
def test_a_group_that_a_client_has_appended_is_complete_before_anything_reads_it(event: Any) -> None:
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = metaopt.build([p], "adamw(lr=cosine(0.1)) | lookahead(k=2)", total_steps=10)
    p.grad = torch.ones(2)
    opt.step()
    opt.param_groups.append({**opt.defaults, "params": [q]})
    after = event(opt) or opt
    for group in after.param_groups:
        for each in group["params"]:
            each.grad = torch.ones(2)
    after.step()
    assert all("lookahead.k" in group for group in after.param_groups)
