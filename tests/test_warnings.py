"""What a stack warns of: allowed, and not what anybody can have meant."""

import copy
import gc
import weakref

import pytest
import pytorch_optimizer
import schedulefree
import torch

import metaopt

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
