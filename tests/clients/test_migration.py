"""Checkpoints move between a bare base and a stack, and between stacks with a wrapper more or less (law 1)."""

import copy
import warnings
from typing import Any

import pytest
import torch
from small_runs import assert_same, assert_same_weights, fill_gradients, loss_of, small_model, train, weights
from torch.testing._internal.common_optimizers import optim_db

import metaopt

each_base = pytest.mark.parametrize("info", [pytest.param(info, id=info.optim_cls.__name__) for info in optim_db])


class Run:
    """A model and an optimizer of one class of torch's, bare or under wrappers."""

    def __init__(self, info: Any, wrappers: Any = None, **options: Any) -> None:
        self.info = info
        self.model = small_model(bias=info.optim_cls.__name__ != "Muon")
        base = info.optim_cls(self.model.parameters(), lr=0.01, **options)
        self.opt: Any = base if wrappers is None else metaopt.wrap(base, wrappers)

    def train(self, steps: range) -> None:
        for step in steps:
            if self.info.step_requires_closure:
                self.opt.step(lambda step=step: self._closure(step))
                continue
            fill_gradients(self.model, step)
            if self.info.only_supports_sparse_grads:
                for p in self.model.parameters():
                    p.grad = p.grad.to_sparse()
            self.opt.step()

    def _closure(self, step: int) -> torch.Tensor:
        self.model.zero_grad()
        loss = loss_of(self.model, step)
        loss.backward()
        return loss

    def go_on_from(self, other: "Run") -> None:
        """Load what another run has saved."""
        self.model.load_state_dict(other.model.state_dict())
        # torch's own load keeps the very tensors of the dict that it is given
        self.opt.load_state_dict(copy.deepcopy(other.opt.state_dict()))


@each_base
def test_from_the_bare_base_into_a_stack_the_run_goes_on_bit_for_bit(info: Any) -> None:
    bare, stack = Run(info), Run(info, "clip_grad_norm(1e9) | lookahead(k=100)")
    bare.train(range(4))
    with pytest.warns(UserWarning, match="started fresh: clip_grad_norm, lookahead"):
        stack.go_on_from(bare)
    report = stack.opt.load_report
    assert (report.taken, report.fresh, report.dropped) == (["base"], ["clip_grad_norm", "lookahead"], [])
    start = weights(stack.model)
    bare.train(range(4, 8))
    stack.train(range(4, 8))
    assert_same_weights(stack.model, bare.model)
    # the slow weights begin where the stack took the run over
    for p, held in zip(stack.model.parameters(), start, strict=True):
        assert_same(stack.opt.state[p]["lookahead.slow"], held)


@each_base
def test_from_a_stack_into_the_bare_base_the_run_goes_on_bit_for_bit(info: Any) -> None:
    bare, stack = Run(info), Run(info, "clip_grad_norm(1e9) | lookahead(k=100)")
    stack.train(range(4))
    bare.go_on_from(stack)
    bare.train(range(4, 8))
    stack.train(range(4, 8))
    assert_same_weights(bare.model, stack.model)


@each_base
def test_there_and_back_again_is_the_run_that_never_moved(info: Any) -> None:
    alone, first, second, third = Run(info), Run(info), Run(info, "ema(0.9)"), Run(info)
    alone.train(range(9))
    first.train(range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        second.go_on_from(first)
    second.train(range(3, 6))
    third.go_on_from(second)
    third.train(range(6, 9))
    assert_same_weights(third.model, alone.model)


def stack_of(spec: str) -> tuple[torch.nn.Module, metaopt.Stack]:
    model = small_model()
    return model, metaopt.build(model.named_parameters(), spec)


BASE = "adamw(lr=0.01)"


def test_into_a_stack_with_a_wrapper_more() -> None:
    model, opt = stack_of(f"{BASE} | lookahead(k=3)")
    train(model, opt, range(4))
    twin, more = stack_of(f"clip_grad_value(1e9) | {BASE} | lookahead(k=3) | ema(0.5)")
    twin.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="taken: base, lookahead; started fresh: clip_grad_value, ema"):
        more.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert more.updates == 4
    assert not any("ema.average" in held for held in more.state.values())
    start = weights(twin)
    train(model, opt, range(4, 5))
    train(twin, more, range(4, 5))
    for p, before, after in zip(twin.parameters(), start, weights(model), strict=True):
        # an average starts where its training starts: here
        torch.testing.assert_close(more.state[p]["ema.average"], before.lerp(after, 0.5))
    train(model, opt, range(5, 9))
    train(twin, more, range(5, 9))
    assert_same_weights(twin, model)


def test_into_a_stack_with_a_wrapper_less() -> None:
    model, opt = stack_of(f"clip_grad_norm(1e9) | {BASE} | lookahead(k=100) | ema(0.5)")
    train(model, opt, range(4))
    twin, less = stack_of(f"{BASE} | ema(0.5)")
    twin.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="taken: base, ema; dropped: clip_grad_norm, lookahead"):
        less.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert not any(key.startswith(("clip", "lookahead")) for entry in less.param_groups for key in entry)
    assert not any(key.startswith("lookahead") for held in less.state.values() for key in held)
    train(model, opt, range(4, 8))
    train(twin, less, range(4, 8))
    assert_same_weights(twin, model)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same(less.state[q]["ema.average"], opt.state[p]["ema.average"])
    less.state_dict()


def test_a_label_carries_a_part_to_another_place_in_the_stack() -> None:
    model, opt = stack_of(f"{BASE} | lookahead(k=2, label='inner') | lookahead(k=4, label='outer')")
    train(model, opt, range(5))
    twin, swapped = stack_of(f"{BASE} | lookahead(k=4, label='outer')")
    twin.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="dropped: inner"):
        swapped.load_state_dict(copy.deepcopy(opt.state_dict()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same(swapped.state[q]["outer.slow"], opt.state[p]["outer.slow"])


class Counts(metaopt.Wrapper):
    """Counts a parameter's updates; a part without any hyperparameter."""

    seen = metaopt.zeros()

    def after_update(self, group: metaopt.Group) -> None:
        torch._foreach_add_(group.seen, 1.0)


def test_a_part_without_hyperparameters_is_taken_dropped_and_started_fresh_like_any_other() -> None:
    def counting() -> tuple[torch.nn.Module, metaopt.Stack]:
        model = small_model()
        return model, metaopt.build(model.named_parameters(), metaopt.adamw(lr=0.01) | Counts())

    model, opt = counting()
    train(model, opt, range(3))
    saved = copy.deepcopy(opt.state_dict())
    twin, again = counting()
    again.load_state_dict(saved)
    assert again.load_report.taken == ["base", "counts"]
    train(twin, again, range(3, 4))
    assert again.state[next(twin.parameters())]["counts.seen"].unique().tolist() == [4.0]
    _, without = stack_of(BASE)
    with pytest.warns(UserWarning, match="dropped: counts"):
        without.load_state_dict(saved)
    assert not any(key.startswith("counts.") for held in without.state.values() for key in held)
    _, fresh = counting()
    with pytest.warns(UserWarning, match="started fresh: counts"):
        fresh.load_state_dict(without.state_dict())


def test_constants_come_from_the_checkpoint_and_how_to_run_from_the_live_stack() -> None:
    model = small_model()
    opt = metaopt.wrap(torch.optim.AdamW(model.parameters(), lr=0.03, betas=(0.8, 0.9)), "lookahead(k=7, alpha=0.8)")
    train(model, opt, range(2))
    twin = small_model()
    other = metaopt.wrap(torch.optim.AdamW(twin.parameters(), foreach=True), "lookahead(k=3)")
    with pytest.warns(UserWarning, match=r"from the checkpoint: betas=\(0.8, 0.9\) \(this stack: \(0.9, 0.999\)\)"):
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
    (entry,) = other.param_groups
    assert (entry["lr"], entry["betas"], entry["lookahead.k"], entry["lookahead.alpha"]) == (0.03, (0.8, 0.9), 7, 0.8)
    assert (entry["foreach"], entry["fused"]) == (True, None)
    assert "lookahead(k=7, alpha=0.8)" in str(other.spec)


def test_scheduled_values_are_those_of_the_live_schedule_at_the_loaded_count() -> None:
    model = small_model()
    opt = metaopt.build(model.named_parameters(), "sgd(lr=cosine(0.1))", total_steps=20)
    train(model, opt, range(7))
    twin = small_model()
    other = metaopt.build(twin.named_parameters(), "sgd(lr=cosine(0.4))", total_steps=20)
    with pytest.warns(UserWarning, match="from this stack's schedule after 7 updates: lr="):
        other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["lr"] == pytest.approx(4 * opt.param_groups[0]["lr"])
    train(twin, other, range(7, 9))


def test_a_checkpoint_taken_inside_averaged_does_not_lose_its_fast_weights_silently() -> None:
    model, opt = stack_of(f"{BASE} | lookahead(k=3)")
    train(model, opt, range(4))
    with opt.averaged():
        saved = copy.deepcopy(opt.state_dict())
    _, without = stack_of(BASE)
    with pytest.raises(metaopt.CheckpointError, match=r"taken inside averaged\('lookahead'\)"):
        without.load_state_dict(saved)
    assert without.updates == 0


def test_what_the_constructor_made_is_not_kept_beside_what_was_loaded() -> None:
    model = small_model()
    opt = metaopt.build(model.named_parameters(), "adagrad(lr=0.1)")
    train(model, opt, range(2))
    twin = small_model()
    again = metaopt.build(twin.named_parameters(), "adagrad(lr=0.1)")
    assert again._run.constructor_state
    again.load_state_dict(opt.state_dict())
    assert not again._run.constructor_state
