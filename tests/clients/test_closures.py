"""Closures: one evaluation per step, more where the base asks for them, and gradient wrappers act on every one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_runs import assert_same_weights, loss_of, small_model, weights
from torch.testing._internal.common_optimizers import optim_db

import metaopt


def closure_of(model: torch.nn.Module, step: int, calls: list[int], after: Any = None) -> Callable[[], torch.Tensor]:
    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        calls.append(step)
        model.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        if after is not None:
            after(model.parameters())
        return loss

    return closure


def clip(parameters: Any) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, 0.05)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_every_evaluation_of_lbfgs_is_clipped(line_search: str | None) -> None:
    model, twin = small_model(dtype=torch.float64), small_model(dtype=torch.float64)
    base, bare = (
        torch.optim.LBFGS(m.parameters(), lr=0.5, max_iter=6, line_search_fn=line_search) for m in (model, twin)
    )
    opt = metaopt.wrap(base, "clip_grad_norm(0.05)")
    found: list[int] = []
    expected: list[int] = []
    for step in range(4):
        loss = opt.step(closure_of(model, step, found))
        by_hand = bare.step(closure_of(twin, step, expected, clip))
        torch.testing.assert_close(loss, by_hand, rtol=1e-9, atol=0)
    assert found == expected
    assert found.count(0) > 1
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-8, atol=1e-10)


def test_lookahead_over_lbfgs_pulls_after_whole_steps() -> None:
    model, twin = small_model(), small_model()
    opt = metaopt.build(model.named_parameters(), "lbfgs(lr=0.5, max_iter=3) | lookahead(k=2)")
    bare = torch.optim.LBFGS(twin.parameters(), lr=0.5, max_iter=3)
    slow = weights(twin)
    for step in range(1, 7):
        opt.step(closure_of(model, step, []))
        bare.step(closure_of(twin, step, []))
        if step % 2 == 0:
            with torch.no_grad():
                for p, held in zip(twin.parameters(), slow, strict=True):
                    p.copy_(held.lerp_(p, 0.5))
    assert_same_weights(model, twin)


@pytest.mark.parametrize("info", [pytest.param(info, id=info.optim_cls.__name__) for info in optim_db])
@pytest.mark.parametrize("keyword", [True, False], ids=["by keyword", "by position"])
def test_a_closure_is_evaluated_as_often_as_by_the_bare_optimizer(info: Any, keyword: bool) -> None:
    models, losses, calls = [], [], []
    for wrapped in (True, False):
        model = small_model(bias=info.optim_cls.__name__ != "Muon")
        base = info.optim_cls(model.parameters(), lr=0.01)
        opt = metaopt.wrap(base, "lookahead(k=2, alpha=1.0)") if wrapped else base
        counted: list[int] = []
        found = []
        for step in range(4):
            closure = closure_of(model, step, counted, _made_sparse if info.only_supports_sparse_grads else None)
            found.append(opt.step(closure=closure) if keyword else opt.step(closure))
        models.append(model)
        losses.append([x.item() for x in found])
        calls.append(counted)
    assert losses[0] == losses[1]
    assert calls[0] == calls[1]
    assert_same_weights(*models)


def _made_sparse(parameters: Any) -> None:
    for p in parameters:
        p.grad = p.grad.to_sparse()


def test_without_a_closure_the_step_returns_none() -> None:
    model = small_model()
    opt = metaopt.build(model.named_parameters(), "adamw | lookahead")
    loss_of(model, 0).backward()
    assert opt.step() is None


@pytest.mark.parametrize("returned", [None, 3.0, {"loss": 1.0}])
def test_what_the_closure_returns_is_returned(returned: Any) -> None:
    model = small_model()
    opt = metaopt.build(model.named_parameters(), "clip_grad_norm(1.0) | adamw | lookahead")

    def closure() -> Any:
        loss_of(model, 0).backward()
        return returned

    assert opt.step(closure) is returned
    assert opt.updates == 1


def test_a_closure_that_leaves_no_gradient_skips_the_update_and_returns_its_loss() -> None:
    model = small_model()
    opt = metaopt.build(model.named_parameters(), "clip_grad_norm(1.0) | adamw | lookahead")
    before = weights(model)
    assert opt.step(lambda: torch.tensor(2.0)).item() == 2.0
    assert opt.skipped == "no gradients"
    assert opt.updates == 0
    assert not opt.state
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)


def test_a_base_that_needs_a_closure_says_so_and_changes_nothing() -> None:
    model = small_model()
    opt = metaopt.build(model.named_parameters(), "lbfgs | lookahead")
    loss_of(model, 0).backward()
    with pytest.raises(metaopt.StepError, match=r"call step\(closure\)"):
        opt.step()
    assert opt.updates == 0
