"""`switch`: another base from some update on. It begins as if new, and the wrappers around it go on."""

import copy
import pickle

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import metaopt

Params = list[torch.nn.Parameter]


def weights() -> Params:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (3,))]


def step(params: Params, opt: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(100 + number)

    def closure() -> torch.Tensor:
        for p in params:
            p.grad = 0.5 * p.detach() + torch.randn(p.shape, generator=generator)
        return torch.zeros(())

    opt.step(closure)


def same(left: Params, right: Params) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


SWITCH = "switch(adamw(lr=1e-2), 4, sgd(lr=0.1, momentum=0.9))"


def test_each_base_makes_its_own_updates_and_the_second_begins_as_if_new() -> None:
    params, twins = weights(), weights()
    opt = metaopt.build(params, SWITCH)
    bare: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(twins, lr=1e-2, fused=True),
        torch.optim.SGD(twins, lr=0.1, momentum=0.9, fused=True),
    ]
    groups, entry = opt.param_groups, opt.param_groups[0]
    for number in range(9):
        assert type(opt.base) is (torch.optim.AdamW if number < 4 else torch.optim.SGD)
        assert entry["lr"] == (1e-2 if number < 4 else 0.1)
        step(params, opt, number)
        step(twins, bare[number >= 4], number)
        assert same(params, twins), number
        own = {"step", "exp_avg", "exp_avg_sq"} if number < 3 else {"momentum_buffer"} if number > 3 else set()
        assert set(opt.state[params[0]]) == own
    assert opt.updates == 9
    # clients hold the list and the dicts
    assert opt.param_groups is groups and opt.param_groups[0] is entry
    assert "betas" not in entry and entry["momentum"] == 0.9


def test_wrappers_around_go_on_and_those_inside_come_and_go() -> None:
    params = weights()
    opt = metaopt.build(
        params,
        "clip_grad_norm(1.0) | switch(adamw(lr=1e-2) | lookahead(k=2, label='first'), 4, "
        "clip_grad_value(0.1) | sgd(lr=0.1) | lookahead(k=2, label='second')) | ema(0.5)",
    )
    average = [p.detach().clone() for p in params]
    for number in range(8):
        inside = "first" if number < 4 else "second"
        assert [w.label for w in opt.wrappers if w.label in ("first", "second")] == [inside]
        step(params, opt, number)
        average = [torch.lerp(a, p.detach(), 0.5) for a, p in zip(average, params, strict=True)]
        torch.testing.assert_close([opt.state[p]["ema.average"] for p in params], average)
        keys = {key.split(".")[0] for key in (*opt.state[params[0]], *opt.param_groups[0]) if "." in key}
        assert keys >= {"ema"} and ("first" in keys) == (number < 3) and ("clip_grad_value" in keys) == (number >= 3)
    with opt.averaged():
        assert torch.equal(params[0].detach(), opt.spec and average[0])


def test_a_schedule_inside_counts_from_the_change_and_to_its_end() -> None:
    params = weights()
    spec = "switch(adamw(lr=linear(0.4, 0.0)), 4, sgd(lr=cosine(0.1)), 0.2, sgd(lr=linear(0.0, 0.4, steps=2)))"
    opt = metaopt.build(params, spec, total_steps=10)
    cosine = metaopt.cosine(0.1).curve(10, 2)
    expected = [0.4, 0.3, 0.2, 0.1, cosine(0), cosine(1), 0.0, 0.2, 0.4, 0.4]
    rates = []
    for number in range(10):
        rates.append(opt.param_groups[0]["lr"])
        step(params, opt, number)
    assert rates == pytest.approx(expected)
    assert str(opt.spec) == spec.replace("linear(0.4, 0.0)", "linear(start=0.4, end=0.0)").replace(
        "cosine(0.1)", "cosine(start=0.1)"
    ).replace("linear(0.0, 0.4, steps=2)", "linear(start=0.0, end=0.4, steps=2)").replace("lr=1e-2", "lr=0.01")


WRAPPED = f"{SWITCH} | lookahead(k=3, pullback_momentum='pullback') | ema(0.9)"


@pytest.mark.parametrize("way", ["checkpoint", "checkpoint over a later run", "copy", "pickle"])
@pytest.mark.parametrize("at", [0, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("spec", [WRAPPED, SWITCH.replace("sgd(lr=0.1, momentum=0.9)", "adagrad(lr=0.1)")])
def test_a_checkpoint_knows_which_base_is_on(spec: str, at: int, way: str) -> None:
    params = weights()
    opt = metaopt.build(params, spec)
    for number in range(at):
        step(params, opt, number)
    if way == "copy":
        twins, other = copy.deepcopy((params, opt))
    elif way == "pickle":
        twins, other = pickle.loads(pickle.dumps((params, opt)))
    else:
        twins = weights()
        other = metaopt.build(twins, spec)
        for number in range(6 if "later" in way else 0):
            step(twins, other, number)
        for p, q in zip(twins, params, strict=True):
            p.data.copy_(q.data)
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert type(other.base) is type(opt.base) and other.param_groups[0]["lr"] == opt.param_groups[0]["lr"]
    for number in range(at, 11):
        step(params, opt, number)
        step(twins, other, number)
        assert same(params, twins), number
    assert opt.state[params[0]].keys() == other.state[twins[0]].keys()


@pytest.mark.parametrize("at", [2, 6])
def test_a_checkpoint_that_is_refused_changes_nothing(at: int) -> None:
    params, others = weights(), weights()
    opt, later = metaopt.build(params, WRAPPED), metaopt.build(others, WRAPPED)
    for number in range(at):
        step(params, opt, number)
    for number in range(8 - at):
        step(others, later, number)
    saved = copy.deepcopy(later.state_dict())
    saved["state"][1] = {k: torch.zeros(7, 7) if torch.is_tensor(v) else v for k, v in saved["state"][1].items()}
    before, twin = copy.deepcopy(opt.state_dict()), copy.deepcopy((params, opt))
    with pytest.raises(metaopt.CheckpointError):
        opt.load_state_dict(saved)
    assert repr(opt.state_dict()) == repr(before)
    for number in range(at, 8):
        step(params, opt, number)
        step(twin[0], twin[1], number)
    assert same(params, twin[0])


def test_a_rate_that_a_plateau_has_lowered_after_the_change_is_resumed_without_a_warning() -> None:
    params, twins = weights(), weights()
    spec = f"{SWITCH} | plateau('loss', patience=0, factor=0.5)"
    opt, other = metaopt.build(params, spec), metaopt.build(twins, spec)
    for number in range(6):
        step(params, opt, number)
    opt.record(loss=1.0)
    opt.record(loss=1.0)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert other.param_groups[0]["lr"] == opt.param_groups[0]["lr"] == 0.05


def test_a_bare_checkpoint_of_the_first_base_loads() -> None:
    params, twins = weights(), weights()
    bare = torch.optim.AdamW(twins, lr=1e-2)
    for number in range(3):
        step(twins, bare, number)
    opt = metaopt.build(params, SWITCH)
    opt.load_state_dict(copy.deepcopy(bare.state_dict()))
    assert torch.equal(opt.state[params[0]]["exp_avg"], bare.state[twins[0]]["exp_avg"])


def test_a_change_that_comes_earlier_in_the_resumed_run_is_made_and_none_is_taken_back() -> None:
    params = weights()
    opt = metaopt.build(params, "switch(adamw(lr=1e-2), 5, sgd(lr=0.1))")
    for number in range(3):
        step(params, opt, number)
    saved = copy.deepcopy(opt.state_dict())
    earlier = metaopt.build(weights(), "switch(adamw(lr=1e-2), 2, sgd(lr=0.1))")
    earlier.load_state_dict(saved)
    assert type(earlier.base) is torch.optim.SGD
    for number in range(3, 6):
        step(params, opt, number)
    later = metaopt.build(weights(), "switch(adamw(lr=1e-2), 50, sgd(lr=0.1))")
    later.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert type(later.base) is torch.optim.SGD


def test_counters_that_begin_again_begin_with_the_first_base() -> None:
    params = weights()
    opt = metaopt.build(params, SWITCH)
    for number in range(6):
        step(params, opt, number)
    opt.reset_state("counters")
    assert type(opt.base) is torch.optim.AdamW and opt.param_groups[0]["lr"] == 1e-2
    for number in range(5):
        step(params, opt, number)
    assert type(opt.base) is torch.optim.SGD


def test_lbfgs_may_come_after_adam() -> None:
    def rosenbrock(p: torch.Tensor) -> torch.Tensor:
        return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2

    x = torch.nn.Parameter(torch.tensor([-1.5, 2.0], dtype=torch.float64))
    opt = metaopt.build([x], "switch(adam(lr=0.05), 50, lbfgs(lr=1.0, line_search_fn='strong_wolfe'))")

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = rosenbrock(x)
        loss.backward()
        return loss

    for _ in range(53):
        loss = opt.step(closure)
    assert type(opt.base) is torch.optim.LBFGS and opt.updates == 53
    assert float(rosenbrock(x.detach())) < 1e-12 and float(loss.detach()) < 1e-6


def test_what_a_group_has_of_its_own_stays_with_it() -> None:
    model = torch.nn.Linear(3, 2)
    groups = metaopt.groups(model, {"bias": {"lr_scale": 0.5}}, no_decay="1d")
    opt = metaopt.build(
        groups, "switch(adamw(lr=1e-2), 2, sgd(lr=0.1, weight_decay=0.3), 2, decay(0.2) | adam(lr=1.0))"
    )
    found = []
    for number in range(5):
        found.append([(g["lr"], g["weight_decay"], g.get("decay.weight_decay")) for g in opt.param_groups])
        step(list(model.parameters()), opt, number)
    scaled, decayed = ([row[i] for row in found] for i in (0, 1))
    assert decayed == [(1e-2, 0.01, None)] * 2 + [(0.1, 0.3, None)] * 2 + [(1.0, 0, 0.2)]
    assert scaled == [(5e-3, 0, None)] * 2 + [(0.05, 0, None)] * 2 + [(0.5, 0, 0.0)]


def test_a_group_may_come_after_the_change() -> None:
    params = weights()
    opt = metaopt.build(params[:1], WRAPPED)
    for number in range(6):
        step(params[:1], opt, number)
    opt.add_param_group({"params": params[1:]})
    for number in range(6, 9):
        step(params, opt, number)
    assert set(opt.state[params[1]]) == set(opt.state[params[0]]) and "momentum_buffer" in opt.state[params[1]]
    twins = weights()
    twin = metaopt.build(twins[:1], WRAPPED)
    twin.add_param_group({"params": twins[1:]})
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert type(twin.base) is torch.optim.SGD


def test_a_distributed_checkpoint_has_the_same_keys_for_all_right_after_the_change() -> None:
    model = torch.nn.Linear(3, 2)
    opt = metaopt.build(model, WRAPPED)
    for number in range(4):
        step(list(model.parameters()), opt, number)
    state = get_optimizer_state_dict(model, opt)["state"]
    assert state["weight"].keys() == state["bias"].keys() >= {"momentum_buffer", "ema.average"}


def test_a_plateau_of_the_first_base_does_not_lower_the_rate_of_the_second() -> None:
    params = weights()
    opt = metaopt.build(
        params, "switch(adamw(lr=cosine(1e-2)), 4, sgd(lr=cosine(0.1))) | plateau('loss', patience=0)", total_steps=9
    )
    for number in range(4):
        opt.record(loss=1.0)
        step(params, opt, number)
    assert opt.param_groups[0]["lr"] == 0.1
    opt.record(loss=1.0)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize(
    "written",
    [
        SWITCH,
        {"switch": [{"adamw": {"lr": 1e-2}}, 4, {"sgd": {"lr": 0.1, "momentum": 0.9}}]},
        {"switch": ["adamw(lr=1e-2)", 4, "sgd(lr=0.1, momentum=0.9)"]},
        metaopt.switch(metaopt.adamw(lr=1e-2), 4, metaopt.sgd(lr=0.1, momentum=0.9)),
        metaopt.switch(torch.optim.AdamW, 4, "sgd(lr=0.1, momentum=0.9)"),
    ],
    ids=["text", "data", "data with text", "parts", "a class"],
)
def test_it_may_be_written_in_every_form(written: object) -> None:
    opt = metaopt.build(weights(), written)
    assert "sgd(lr=0.1, momentum=0.9)" in str(opt.spec)
    assert str(metaopt.build(weights(), str(opt.spec)).spec) == str(opt.spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("switch(adamw, 4)", "odd number"),
        ("switch(adamw)", "odd number"),
        ("switch(adamw, sgd(lr=0.1), 4)", "expected a base"),
        ("switch(adamw, sgd(lr=0.1), adam)", "length of a stage"),
        ("switch(adamw, 0, sgd(lr=0.1))", "length of a stage"),
        ("switch(adamw, True, sgd(lr=0.1))", "length of a stage"),
        ("switch(4, adamw, sgd(lr=0.1))", "expected a base"),
        ("switch(adamw, 0.5, sgd(lr=0.1))", "total_steps"),
        ("switch(adamw, 4, sgd(lr=-1.0))", "learning rate"),
        ("switch(adamw, 4, muon(lr=0.1))", "muon"),  # one of the parameters is a vector
        ("switch(adamw, 4, lookahead)", "needs a base"),
        ("switch(adamw, 4, sgd(lr=0.1) | clip_grad_norm(1.0))", "before sgd"),
        ("switch(adamw, 4, sgd(lr=0.1) | ema) | ema", "two parts are labelled"),
        ("switch(adamw, 4, switch(adamw, 4, sgd(lr=0.1)))", "plain bases"),
        ("switch(adamw, 4, base=sgd(lr=0.1))", "no hyperparameter 'base'"),
        ("partition({'*': switch(adamw, 4, sgd(lr=0.1))})", "plain base"),
        ("switch(adamw, 4, sgd(lr=cosine(0.1)))", "total_steps"),
        ("skip_nonfinite(3) | switch(adamw, 4, lbfgs)", "skips updates"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_built(spec: str, message: str) -> None:
    named = [(f"p{i}", p) for i, p in enumerate(weights())]
    with pytest.raises(metaopt.MetaoptError, match=message):
        metaopt.build(named, spec)


def test_a_base_that_would_begin_after_the_run_and_a_rate_of_a_group_are_refused() -> None:
    with pytest.raises(metaopt.SpecError, match="the run has 4"):
        metaopt.build(weights(), SWITCH, total_steps=4)
    with pytest.raises(metaopt.HyperparameterError, match="lr_scale"):
        metaopt.build([{"params": weights(), "lr": 0.3}], SWITCH)


def test_the_explanation_follows_the_base_that_is_on() -> None:
    params = weights()[:1]
    opt = metaopt.build(params, "switch(adamw(lr=1e-3), 2, sgd(lr=0.1))")
    assert metaopt.explain(opt).findings == ()
    for number in range(2):
        assert "AdamW" in metaopt.explain(opt).rows[0].order
        step(params, opt, number)
    assert "SGD" in metaopt.explain(opt).rows[0].order


@pytest.mark.slow
def test_a_compiled_step_goes_on_over_the_change() -> None:
    params, twins = weights(), weights()
    opt, plain = metaopt.build(params, WRAPPED), metaopt.build(twins, WRAPPED)
    compiled = torch.compile(opt.step, backend="eager")
    for number in range(7):
        generator = torch.Generator().manual_seed(number)
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        compiled()
        plain.step()
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p, q)
    assert type(opt.base) is torch.optim.SGD
