"""What a stack warns of: allowed, and not what anybody can have meant."""

import copy
import gc
import math
import warnings
import weakref
from pathlib import Path
from typing import Any

import hydra
import pytest
import pytorch_optimizer
import schedulefree
import torch
from accelerate import Accelerator

import metaopt

# ---- where a warning points


def here(line_of: str, told: Any) -> None:
    """Raise AssertionError unless every warning points at the line of this file that holds a text."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    assert {(Path(w.filename).name, lines[w.lineno - 1].strip()) for w in told} == {(Path(__file__).name, line_of)}


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))


def test_a_hint_at_what_hydra_builds_points_at_the_line_that_has_it_built() -> None:
    configuration = {"_target_": "metaopt.Optimizer", "spec": "adamw(lr=1e-3)", "_convert_": "all"}
    with pytest.warns(metaopt.HintWarning) as told:
        hydra.utils.instantiate(configuration, params=net())
    here("hydra.utils.instantiate(configuration, params=net())", told)


def test_a_warning_from_a_step_under_accelerate_points_at_the_step_of_the_loop() -> None:
    model, accelerator = net(), Accelerator(cpu=True)
    opt = accelerator.prepare(metaopt.build(model.parameters(), "clip_grad_norm(1.0) | sgd(lr=0.1)"))
    accelerator.backward(model(torch.ones(4, 3)).square().mean() * 1e3)
    accelerator.clip_grad_norm_(model.parameters(), 0.5)
    with pytest.warns(metaopt.MetaoptWarning, match="clipped to a norm of 0.5") as told:
        opt.step()
    here("opt.step()", told)


def test_warnings_of_steps_and_loads_point_at_the_loop() -> None:
    frozen = net()
    frozen[0].requires_grad_(False)
    opt = metaopt.build(metaopt.groups(frozen), "sgd(lr=linear(1.0, 0.5, 10))")
    frozen.requires_grad_(True)
    opt.param_groups[0]["lr"] = 0.25
    frozen(torch.ones(4, 3)).sum().backward()
    with pytest.warns(metaopt.MetaoptWarning) as told:
        opt.step(None)
    assert len(told) == 2
    here("opt.step(None)", told)
    other = metaopt.build(frozen.parameters(), "sgd(lr=0.1) | ema")
    with pytest.warns(metaopt.MetaoptWarning, match="loaded a checkpoint that differs") as told:
        other.load_state_dict(metaopt.build(frozen.parameters(), "sgd(lr=0.2)").state_dict())
    here('other.load_state_dict(metaopt.build(frozen.parameters(), "sgd(lr=0.2)").state_dict())', told)


class Warns(metaopt.Wrapper):
    """Warns in a hook."""

    def after_update(self, group: metaopt.Group) -> None:
        metaopt.warn("something is odd")


def test_a_plugin_warns_at_the_loop_too() -> None:
    opt = metaopt.build(net().parameters(), [metaopt.sgd(lr=0.1), Warns()])
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with pytest.warns(metaopt.MetaoptWarning, match="something is odd") as told:
        opt.step(lambda: torch.zeros(()))
    here("opt.step(lambda: torch.zeros(()))", told)


def test_every_warning_is_made_in_one_place() -> None:
    root = Path(metaopt.__file__).parent
    files = [*root.rglob("*.py"), *(root.parent / "plugins").rglob("*.py")]
    assert {file.name for file in files if "warnings.warn" in file.read_text(encoding="utf-8")} == {"errors.py"}


# ---- a run longer than its schedules


def stepped(opt: torch.optim.Optimizer, updates: int) -> None:
    for _ in range(updates):
        for p in opt.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        opt.step()


@pytest.mark.parametrize(
    ("spec", "held"),
    [
        ("sgd(lr=cosine(1.0))", "lr=0"),
        ("sgd(lr=warmup(constant(0.5), 0.25))", "lr=0.5"),
        ("sgd(lr=0.1) | lookahead(k=2, alpha=linear(0.5, 0.25))", "lookahead.alpha=0.25"),
        ("adamw(lr=0.1, betas=(linear(0.8, 0.9), 0.99))", "betas=(0.9, 0.99)"),
        ("switch(sgd(lr=0.1), 2, sgd(lr=cosine(0.1), momentum=0.9))", "lr=0"),
    ],
)
def test_a_run_that_goes_on_past_total_steps_says_once_that_schedules_keep_their_last_values(
    spec: str, held: str
) -> None:
    opt = metaopt.build(metaopt.groups(net(), no_decay="1d"), spec, total_steps=4)
    stepped(opt, 4)
    with pytest.warns(metaopt.MetaoptWarning, match="this was update 5 of a run of total_steps=4") as told:
        stepped(opt, 3)
    assert len(told) == 1
    assert f"keep their last values from now on ({held})" in str(told[0].message)
    here("opt.step()", told)
    assert all(math.isfinite(group["lr"]) for group in opt.param_groups)


def test_a_schedule_of_a_group_counts_too() -> None:
    opt = metaopt.build(metaopt.groups(net(), {"0.*": {"lr": metaopt.cosine(0.1)}}), "sgd(lr=0.1)", total_steps=2)
    with pytest.warns(metaopt.MetaoptWarning, match="update 3 of a run of total_steps=2"):
        stepped(opt, 3)


@pytest.mark.parametrize(
    ("spec", "total_steps"),
    [("sgd(lr=0.1)", 2), ("sgd(lr=cosine(0.1, steps=2))", 2), ("sgd(lr=cosine(0.1, steps=2))", None)],
)
def test_nothing_is_said_of_a_run_whose_schedules_do_not_end_with_it(spec: str, total_steps: int | None) -> None:
    stepped(metaopt.build(net().parameters(), spec, total_steps=total_steps), 4)


def test_a_run_that_is_extended_says_nothing_before_its_new_end() -> None:
    opt = metaopt.build(net().parameters(), "sgd(lr=cosine(0.1))", total_steps=3)
    stepped(opt, 3)
    longer = metaopt.build(net().parameters(), "sgd(lr=cosine(0.1))", total_steps=6)
    longer.load_state_dict(opt.state_dict(), extend=True)
    stepped(longer, 3)
    with pytest.warns(metaopt.MetaoptWarning, match="update 7 of a run of total_steps=6"):
        stepped(longer, 1)


class Tenth(metaopt.Schedule):
    """Falls at a tenth of the run, and never asks whether its length is known."""

    def curve(self, run: Any, span: Any) -> Any:
        begin = run * 0.1
        return lambda t: 1.0 if t < begin else 0.1


def test_a_schedule_that_computes_with_the_length_of_the_run_ends_with_it() -> None:
    opt = metaopt.build(net().parameters(), metaopt.sgd(lr=Tenth()), total_steps=2)
    with pytest.warns(metaopt.MetaoptWarning, match="this was update 3 of a run of total_steps=2"):
        stepped(opt, 3)


class Points(metaopt.Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.points: dict[int, dict[str, float]] = {}

    def open(self, **of_run: Any) -> None:
        pass

    def scalars(self, step: int, values: Any) -> None:
        self.points[step] = dict(values)


def test_an_update_past_the_end_is_logged_as_its_own_where_the_warning_is_an_error() -> None:
    log = Points()
    opt = metaopt.build(net().parameters(), "sgd(lr=cosine(1.0))", total_steps=2, log=log, log_every=1)
    stepped(opt, 2)
    opt.record(loss=3.0)
    with warnings.catch_warnings(), pytest.raises(metaopt.MetaoptWarning, match="this was update 3"):
        warnings.simplefilter("error", metaopt.MetaoptWarning)
        stepped(opt, 1)
    opt.record(loss=4.0)
    stepped(opt, 1)
    assert {step: values["train/loss"] for step, values in log.points.items() if step > 2} == {3: 3.0, 4: 4.0}


def test_a_run_past_its_end_is_loaded_without_a_word() -> None:
    opt = metaopt.build(net().parameters(), "sgd(lr=cosine(0.1))", total_steps=2)
    stepped(opt, 2)
    with pytest.warns(metaopt.MetaoptWarning, match="this was update 3"):
        stepped(opt, 1)
    again = metaopt.build(net().parameters(), "sgd(lr=cosine(0.1))", total_steps=2)
    again.load_state_dict(opt.state_dict())
    with pytest.warns(metaopt.MetaoptWarning, match="this was update 4"):
        stepped(again, 1)


# ---- the base is stepped by itself


def wrapped(spec: str = "lookahead(k=5)") -> tuple[torch.nn.Parameter, torch.optim.SGD, metaopt.Stack]:
    p = torch.nn.Parameter(torch.zeros(1))
    base = torch.optim.SGD([p], lr=1.0)
    return p, base, metaopt.wrap(base, spec)


def test_a_wrapped_optimizer_that_is_stepped_itself_says_once_that_the_stack_did_not_see_it() -> None:
    p, base, opt = wrapped()
    p.grad = torch.ones(1)
    with pytest.warns(metaopt.MetaoptWarning, match=r"SGD\.step\(\) was called .* lookahead did not act") as told:
        for _ in range(3):
            base.step()
    assert len(told) == 1
    assert p.item() == -3.0
    assert opt.updates == 0


def test_a_stack_steps_its_base_without_a_word_and_lets_it_go_with_it() -> None:
    p, base, opt = wrapped()
    p.grad = torch.ones(1)
    opt.step(lambda: torch.zeros(()))
    twin = copy.deepcopy(opt)
    twin.step()
    gone = weakref.ref(base)
    gc.collect()
    gc.disable()
    try:
        del base, opt
        assert gone() is None
    finally:
        gc.enable()


def test_a_base_whose_stack_is_gone_is_an_ordinary_optimizer_and_can_be_wrapped_again() -> None:
    p, base, opt = wrapped()
    del opt
    p.grad = torch.ones(1)
    base.step()
    opt = metaopt.wrap(base, "lookahead(k=5)")
    opt.step()
    with pytest.warns(metaopt.MetaoptWarning) as told:
        base.step()
    assert len(told) == 1
    assert p.item() == -3.0


@pytest.mark.parametrize("first", ["scheduler", "stack"])
def test_a_scheduler_of_the_wrapped_optimizer_goes_on_as_before(first: str) -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    base = torch.optim.SGD([p], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(base, 1) if first == "scheduler" else None
    opt = metaopt.wrap(base, "lookahead(k=5)")
    scheduler = scheduler or torch.optim.lr_scheduler.StepLR(base, 1)
    p.grad = torch.ones(1)
    opt.step()
    scheduler.step()  # which warns if it has seen no step
    assert base.param_groups[0]["lr"] == 0.1
    with pytest.warns(metaopt.MetaoptWarning):
        base.step()


# ---- a base that takes moves of the weights back


def make(kind: type[torch.optim.Optimizer], p: torch.nn.Parameter) -> torch.optim.Optimizer:
    return kind([p], lr=0.1)


FREE = [schedulefree.SGDScheduleFree, schedulefree.AdamWScheduleFree, schedulefree.RAdamScheduleFree]


@pytest.mark.parametrize("kind", FREE)
@pytest.mark.parametrize("spec", ["lookahead(k=5)", "outer(k=5)", "cautious"])
def test_moving_the_weights_of_a_schedule_free_base_is_warned_of(kind: type, spec: str) -> None:
    p = torch.nn.Parameter(torch.full((3,), 5.0))
    with pytest.warns(
        metaopt.MetaoptWarning, match=rf"{spec.partition('(')[0]} moves the weights, but {kind.__name__}"
    ):
        opt = metaopt.wrap(make(kind, p), spec)
    assert "base-bound-to-weights" in [finding.code for finding in metaopt.explain(opt).findings]


@pytest.mark.parametrize("kind", FREE)
@pytest.mark.parametrize("spec", ["ema", "clip_grad_norm(1.0)", "lawa(k=1, n=2)", []])
def test_what_moves_no_weights_goes_with_a_schedule_free_base(kind: type, spec: str) -> None:
    opt = metaopt.wrap(make(kind, torch.nn.Parameter(torch.ones(3))), spec)
    assert "base-bound-to-weights" not in [finding.code for finding in metaopt.explain(opt).findings]


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion", "prodigy", "came", "lamb", "adan", "madgrad"])
def test_explain_finds_bases_that_compute_the_weights_anew(name: str) -> None:
    base = pytorch_optimizer.load_optimizer(name)([torch.nn.Parameter(torch.ones(3, 3))], lr=1e-3)
    opt = metaopt.wrap(base, "lookahead(k=5)")
    found = "base-bound-to-weights" in [finding.code for finding in metaopt.explain(opt).findings]
    assert found == (name == "madgrad")


def test_a_part_of_the_stack_follows_when_the_weights_move() -> None:
    opt = metaopt.build([torch.nn.Parameter(torch.ones(3))], "sgd(lr=0.1) | schedule_free | lookahead(k=5)")
    assert "base-bound-to-weights" not in [finding.code for finding in metaopt.explain(opt).findings]
