"""torch's hooks on a stack: step, state dict and load, before and after, once each and with the stack as argument."""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from small_runs import fill_gradients, loss_of, small_model, train
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import metaopt

SPEC = "clip_grad_norm(0.5) | adamw(lr=0.01) | lookahead(k=2)"
Seen = list[tuple[str, Any]]


def made() -> tuple[torch.nn.Module, metaopt.Stack]:
    model = small_model()
    return model, metaopt.build(model.named_parameters(), SPEC)


def noting(seen: Seen, name: str) -> Callable[..., None]:
    def hook(opt: torch.optim.Optimizer, *rest: Any) -> None:
        seen.append((name, opt))

    return hook


@contextmanager
def global_hooks(seen: Seen) -> Iterator[None]:
    handles = [
        register_optimizer_step_pre_hook(noting(seen, "global pre")),
        register_optimizer_step_post_hook(noting(seen, "global post")),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


ORDER = ["global pre", "pre", "post", "global post"]


def assert_hooks_fire(model: torch.nn.Module, opt: metaopt.Stack, steps: range) -> None:
    seen: Seen = []
    opt.register_step_pre_hook(noting(seen, "pre"))
    opt.register_step_post_hook(noting(seen, "post"))
    with global_hooks(seen):
        for step in steps:
            # the model's own zero_grad: the optimizer's is never called, as in the Hugging Face Trainer
            fill_gradients(model, step)
            opt.step()
    assert seen == [(name, opt) for _ in steps for name in ORDER]


def test_step_hooks_fire_once_per_step_from_the_first_one_with_the_stack_as_argument() -> None:
    assert_hooks_fire(*made(), range(4))


@pytest.mark.parametrize("compiled", [False, True], ids=["alone", "after a compilation"])
def test_step_hooks_fire_once_with_a_closure_that_the_base_evaluates_many_times(compiled: bool) -> None:
    if compiled:  # from then on the class's step has one wrapper more
        torch.compile(torch.square, backend="eager")(torch.ones(2))
        assert torch.optim.LBFGS.step.__wrapped__.hooked  # type: ignore[attr-defined]
    model = small_model()
    opt = metaopt.build(model.named_parameters(), "lbfgs(lr=0.1, max_iter=4) | lookahead(k=2)")
    seen: Seen = []
    opt.register_step_pre_hook(noting(seen, "pre"))
    opt.register_step_post_hook(noting(seen, "post"))
    calls = 0

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        opt.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    with global_hooks(seen):
        opt.step(closure)
    assert calls > 1
    assert seen == [(name, opt) for name in ORDER]


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("steps", [0, 3])
def test_hooks_fire_on_a_copy_once_and_the_original_s_stay_with_the_original(copied: Any, steps: int) -> None:
    model, opt = made()
    seen: Seen = []
    opt.register_step_post_hook(noting(seen, "original"))
    train(model, opt, range(steps))
    seen.clear()
    twin, other = copied((model, opt))
    assert_hooks_fire(twin, other, range(3))
    assert seen == []  # as torch's own optimizers: a copy has no hooks
    train(model, opt, [9])
    assert seen == [("original", opt)]


def test_other_stacks_keep_firing_once_after_one_was_copied() -> None:
    model, opt = made()
    copy.deepcopy((model, opt))
    assert_hooks_fire(*made(), range(2))
    assert_hooks_fire(model, opt, range(2))


def test_the_base_s_own_class_keeps_its_hooks_for_other_instances() -> None:
    model, opt = made()
    train(model, opt, range(2))
    twin = small_model()
    bare = torch.optim.AdamW(twin.parameters())
    seen: Seen = []
    bare.register_step_post_hook(noting(seen, "bare"))
    train(twin, bare, range(2))
    assert seen == [("bare", bare)] * 2


def test_hooks_of_the_base_move_to_the_stack_and_their_handles_still_remove_them() -> None:
    model = small_model()
    base = torch.optim.AdamW(model.parameters())
    seen: Seen = []
    handle = base.register_step_post_hook(noting(seen, "post"))
    opt = metaopt.wrap(base, "lookahead(k=2)")
    train(model, opt, range(2))
    assert seen == [("post", opt)] * 2
    handle.remove()
    train(model, opt, range(2))
    assert len(seen) == 2


def test_hooks_put_on_the_base_after_it_was_wrapped_are_not_lost() -> None:
    model = small_model()
    base = torch.optim.AdamW(model.parameters())
    opt = metaopt.wrap(base, "lookahead(k=2)")
    seen: Seen = []
    base.register_step_post_hook(noting(seen, "post"))
    train(model, opt, range(2))
    assert seen == [("post", opt)] * 2


def test_a_post_hook_sees_the_final_weights_and_a_pre_hook_may_change_the_closure() -> None:
    model, opt = made()
    after: list[torch.Tensor] = []
    opt.register_step_post_hook(lambda opt, args, kwargs: after.append(next(model.parameters()).detach().clone()))
    for step in range(4):
        fill_gradients(model, step)
        opt.step()
        assert torch.equal(after[-1], next(model.parameters()))  # the pull of Lookahead included
    opt.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: torch.tensor(7.0)), {}))
    assert float(opt.step()) == 7.0


def test_a_pre_hook_that_returns_nonsense_is_refused_as_torch_does() -> None:
    model, opt = made()
    opt.register_step_pre_hook(lambda opt, args, kwargs: "nonsense")  # type: ignore[arg-type, return-value]
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        train(model, opt, range(1))
    assert opt.updates == 0


def test_state_dict_hooks_fire_once_and_may_replace_what_is_saved() -> None:
    model, opt = made()
    train(model, opt, range(3))
    seen: Seen = []
    opt.register_state_dict_pre_hook(noting(seen, "pre"))
    opt.register_state_dict_post_hook(noting(seen, "post"))
    opt.state_dict()
    assert seen == [("pre", opt), ("post", opt)]
    opt.register_state_dict_post_hook(lambda opt, state: {**state, "note": "mine"})
    assert opt.state_dict()["note"] == "mine"


def test_load_hooks_fire_once_and_may_replace_what_is_loaded() -> None:
    model, opt = made()
    train(model, opt, range(3))
    saved = copy.deepcopy(opt.state_dict())
    _, fresh = made()
    seen: Seen = []
    fresh.register_load_state_dict_pre_hook(noting(seen, "pre"))
    fresh.register_load_state_dict_post_hook(noting(seen, "post"))

    def slower(opt: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        state = copy.deepcopy(state)
        state["param_groups"][0]["lr"] = 0.005
        return state

    fresh.register_load_state_dict_pre_hook(slower)
    fresh.load_state_dict(saved)
    assert seen == [("pre", fresh), ("post", fresh)]
    assert fresh.param_groups[0]["lr"] == 0.005
    assert fresh.updates == 3


def test_a_load_hook_may_look_at_the_stack_when_everything_is_loaded() -> None:
    model, opt = made()
    train(model, opt, range(3))
    _, fresh = made()
    seen = []

    def look(opt: Any) -> None:
        seen.append((opt.updates, len(opt.state), opt.load_report.taken))

    fresh.register_load_state_dict_post_hook(look)
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert seen == [(3, 4, ["base", "clip_grad_norm", "lookahead"])]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_both_ways(set_to_none: bool) -> None:
    model, opt = made()
    fill_gradients(model, 0)
    opt.zero_grad(set_to_none=set_to_none)
    for p in model.parameters():
        assert p.grad is None if set_to_none else torch.equal(p.grad, torch.zeros_like(p))
