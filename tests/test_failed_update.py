"""An update that fails half-way loses nothing of the wrappers' state, and leaves no half-made state behind."""

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_runs import assert_same_weights, fill_gradients, loss_of, small_model, train

import metaopt


class FailsOnce(torch.optim.AdamW):
    """AdamW whose update raises when told to: before it has begun, or when every parameter has moved."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.planned: list[str] = []

    def step(self, closure: Any = None) -> Any:
        when = self.planned.pop() if self.planned else ""
        if when == "before":
            raise RuntimeError("before the update")
        loss = super().step(closure)
        if when == "after":
            raise RuntimeError("after the update")
        return loss


def failing(spec: str) -> tuple[torch.nn.Module, metaopt.Stack, FailsOnce]:
    model = small_model()
    base = FailsOnce(model.parameters(), lr=0.01)
    return model, metaopt.wrap(base, spec), base


SPECS = [
    "clip_grad_norm(0.1) | lookahead(k=2)",
    "lookahead(k=2, pullback_momentum='reset')",
    "lookahead(k=2, pullback_momentum='pullback') | ema(0.9)",
    "accumulate(1) | lookahead(k=2)",
]


@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("spec", SPECS)
def test_a_step_tried_again_goes_on_as_if_it_had_not_failed(spec: str, at: int) -> None:
    model, opt, base = failing(spec)
    twin, plain, _ = failing(spec)
    train(twin, plain, range(8))
    train(model, opt, range(at))
    base.planned.append("before")
    fill_gradients(model, at)
    with pytest.raises(RuntimeError, match="before"):
        opt.step()
    assert opt.updates == at
    train(model, opt, range(at, 8))
    assert_same_weights(model, twin)


@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("spec", SPECS)
def test_a_base_that_fails_when_it_has_moved_everything_leaves_whole_state(spec: str, at: int) -> None:
    model, opt, base = failing(spec)
    train(model, opt, range(at))
    start = [p.detach().clone() for p in model.parameters()]
    base.planned.append("after")
    with pytest.raises(RuntimeError, match="after"):
        train(model, opt, [at])
    keys = {frozenset(held) for held in opt.state.values()}
    assert len(keys) == 1
    assert {"exp_avg", "lookahead.slow"} <= next(iter(keys))
    if at == 0:
        slow = [opt.state[p]["lookahead.slow"] for p in model.parameters()]
        torch.testing.assert_close(slow, start, rtol=0, atol=0)
    assert not hasattr(base, "grad_scale")
    # and a checkpoint of it loads
    other, again, _ = failing(spec)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(model, opt, range(at + 1, 8))
    train(other, again, range(at + 1, 8))
    assert_same_weights(model, other)


def test_a_closure_that_raises_changes_nothing() -> None:
    model, twin = small_model(), small_model()
    spec = "clip_grad_norm(0.1) | adamw(lr=0.01) | lookahead(k=2)"
    opt, plain = (metaopt.build(m.named_parameters(), spec) for m in (model, twin))

    def closure() -> torch.Tensor:
        loss_of(model, 1).backward()
        raise ValueError("out of data")

    train(model, opt, range(3))
    with pytest.raises(ValueError, match="out of data"):
        opt.step(closure)
    train(model, opt, range(3, 8))
    train(twin, plain, range(8))
    assert_same_weights(model, twin)


def test_a_wrapper_that_raises_before_the_update_loses_no_slow_weights() -> None:
    class Refuses(metaopt.Wrapper):
        """Raises when the first gradient is zero."""

        def before_update(self, group: metaopt.Group) -> None:
            if not group.grads[0].any():
                raise ArithmeticError("a zero gradient")

    parts = Refuses() | metaopt.adamw(lr=0.01) | metaopt.lookahead(k=2, pullback_momentum="reset")
    model, twin = small_model(), small_model()
    opt, plain = (metaopt.build(m.named_parameters(), parts) for m in (model, twin))
    for at in range(5):
        opt.zero_grad(set_to_none=False)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        with pytest.raises(ArithmeticError):
            opt.step()
        train(model, opt, [at])
    train(twin, plain, range(5))
    assert_same_weights(model, twin)


def test_a_wrapper_that_raises_behind_the_update_leaves_count_and_schedule_together() -> None:
    class RaisesOnce(metaopt.Wrapper):
        """Raises behind the third update."""

        def after_update(self, group: metaopt.Group) -> None:
            if group.updates == 3:
                raise ArithmeticError("behind the third update")

    model = small_model()
    parts = metaopt.sgd(lr=metaopt.cosine(0.1)) | RaisesOnce()
    opt = metaopt.build(model.named_parameters(), parts, total_steps=10)
    twin = small_model()
    plain = metaopt.build(twin.named_parameters(), "sgd(lr=cosine(0.1))", total_steps=10)
    train(model, opt, range(2))
    with pytest.raises(ArithmeticError):
        train(model, opt, [2])
    train(model, opt, range(3, 8))
    train(twin, plain, range(8))
    assert opt.updates == 8
    assert_same_weights(model, twin)


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_a_window_whose_update_failed_is_what_it_was_before_the_step(weight: float) -> None:
    model, opt, base = failing("accumulate(3) | lookahead(k=2)")
    twin, plain, _ = failing("accumulate(3) | lookahead(k=2)")

    def go(model: torch.nn.Module, opt: metaopt.Stack, steps: Any) -> None:
        for at in steps:
            opt.weigh(weight + at)
            train(model, opt, [at])

    go(twin, plain, range(9))
    go(model, opt, range(5))
    base.planned.append("before")
    with pytest.raises(RuntimeError, match="before"):
        go(model, opt, [5])
    assert opt.updates == 1 and opt.param_groups[0]["accumulate.seen"] == 2
    go(model, opt, range(5, 9))
    assert opt.updates == 3
    assert_same_weights(model, twin)


class FailingDescent(torch.optim.SGD):
    """SGD without momentum, and so without state, whose first update raises when every parameter has moved."""

    fails = True

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        if self.fails:
            self.fails = False
            raise RuntimeError("after the update")
        return loss


def test_an_anchor_over_a_base_without_state_begins_before_the_update_that_failed() -> None:
    model = small_model()
    start = [p.detach().clone() for p in model.parameters()]
    opt = metaopt.wrap(FailingDescent(model.parameters(), lr=0.1), "lookahead(k=2)")
    with pytest.raises(RuntimeError, match="after"):
        train(model, opt, [0])
    moved = [p.detach().clone() for p in model.parameters()]
    assert not any(map(torch.equal, moved, start))
    train(model, opt, [1])
    slow = [opt.state[p]["lookahead.slow"] for p in model.parameters()]
    torch.testing.assert_close(slow, start, rtol=0, atol=0)


class Failing(metaopt.Wrapper):
    """Raises at the second update: in `on_update`, which looks at the change of the weights."""

    def on_update(self, group: metaopt.Group) -> None:
        if group.update and group.updates == 1:
            raise ArithmeticError("the second update")


class FailingBehind(metaopt.Wrapper):
    """Raises behind the second update: in `after_updates`, for which the weights from before are kept."""

    def after_updates(self, groups: metaopt.Groups) -> None:
        for group in groups:
            if group.update and group.updates == 2:
                raise ArithmeticError("the second update")


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """Let the collector see only what the test makes: the rest of a long session is a million objects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def memory_of_tensors() -> int:
    """Return how many bytes all tensors hold that the collector sees."""
    gc.collect()
    held = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, torch.nn.Parameter):
            held[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(held.values())


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("part", [Failing, FailingBehind])
@pytest.mark.parametrize(
    "base",
    [metaopt.adamw(lr=0.01), metaopt.adamw(lr=0.01, foreach=True), metaopt.muon(lr=0.01)],
    ids=["copies", "blocks", "whole"],
)
def test_who_keeps_the_error_of_a_failed_step_keeps_no_copies_of_the_weights(base: Any, part: Any) -> None:
    model = torch.nn.Linear(64, 64, bias=False)
    opt = metaopt.build(model.named_parameters(), base | part())

    def fill() -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)

    fill()
    opt.step()
    fill()
    before = memory_of_tensors()
    with pytest.raises(ArithmeticError) as error:
        opt.step()
    assert error.value.__traceback__ is not None
    assert memory_of_tensors() - before < 64 * 64 * 4


class FailingAtFirst(metaopt.Wrapper):
    """Raises in the first update, when the wrappers' copies of the weights are made and not stored yet."""

    def on_gradients(self, group: metaopt.Group) -> None:
        raise ArithmeticError("the first update")


@pytest.mark.usefixtures("only_new_objects")
def test_who_keeps_the_error_of_a_failed_first_step_keeps_no_slow_weights() -> None:
    model = torch.nn.Linear(64, 64, bias=False)
    opt = metaopt.build(model.named_parameters(), FailingAtFirst() | metaopt.adamw(lr=0.01) | metaopt.lookahead(k=2))
    model.weight.grad = torch.ones_like(model.weight)
    before = memory_of_tensors()
    with pytest.raises(ArithmeticError) as error:
        opt.step()
    assert error.value.__traceback__ is not None
    assert memory_of_tensors() - before < 64 * 64 * 4


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("part", [Failing, FailingBehind])
@pytest.mark.parametrize(
    "base", [metaopt.adamw(lr=0.01), metaopt.adamw(lr=0.01, foreach=True)], ids=["copies", "blocks"]
)
def test_who_keeps_the_error_of_a_failed_step_keeps_no_gradients(base: Any, part: Any) -> None:
    model = torch.nn.Linear(64, 64, bias=False)
    opt = metaopt.build(model.named_parameters(), base | part())
    before = memory_of_tensors()
    model.weight.grad = torch.ones_like(model.weight)
    opt.step()
    model.weight.grad = torch.ones_like(model.weight)
    with pytest.raises(ArithmeticError) as error:
        opt.step()
    model.zero_grad()
    assert error.value.__traceback__ is not None
    # the two moments, and no gradient
    assert memory_of_tensors() - before < 3 * 64 * 64 * 4


class LooksBack(metaopt.Wrapper):
    """Wants the weights from before behind the update."""

    def after_updates(self, groups: metaopt.Groups) -> None:
        for group in groups:
            assert group.update


class Full(metaopt.Logger):
    """A log on a disk that is full."""

    def open(self, **run: Any) -> None:
        pass

    def scalars(self, step: int, values: Any) -> None:
        raise OSError("the disk is full")


@pytest.mark.usefixtures("only_new_objects")
def test_who_keeps_the_error_of_a_log_keeps_no_copies_of_the_weights() -> None:
    model = torch.nn.Linear(64, 64, bias=False)
    opt = metaopt.build(model.named_parameters(), metaopt.adamw(lr=0.01) | LooksBack(), log=Full(), log_every=2)
    for _ in range(2):
        before = memory_of_tensors()
        model.weight.grad = torch.ones_like(model.weight)
        try:
            opt.step()
        except metaopt.LogError as error:
            model.zero_grad()
            assert error.__traceback__ is not None
            assert memory_of_tensors() - before < 64 * 64 * 4
            break
    else:
        pytest.fail("the log did not fail")


def test_a_reset_parameter_begins_anew_after_a_failed_update_whenever_its_gradient_comes() -> None:
    class Refuses(metaopt.Wrapper):
        """Raises at a gradient of zeros."""

        def on_gradients(self, groups: metaopt.Groups) -> None:
            if any(not g.any() for group in groups for g in group.grads):
                raise ArithmeticError("a zero gradient")

    model = small_model()
    opt = metaopt.build(model.named_parameters(), Refuses() | metaopt.adamw(lr=0.01) | metaopt.ema(0.9))
    train(model, opt, range(2))
    opt.reset_state("moments")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(ArithmeticError):
        opt.step()
    first, *others = model.parameters()
    fill_gradients(model, 2)
    first.grad = None
    opt.step()
    train(model, opt, [3])
    assert float(opt.state[first]["step"]) == 1
    assert all(float(opt.state[p]["step"]) == 2 for p in others)


def test_losses_of_an_update_that_failed_behind_the_base_are_not_in_the_next_one() -> None:
    class RaisesOnce(metaopt.Wrapper):
        """Raises behind the first update."""

        def after_update(self, group: metaopt.Group) -> None:
            if group.updates == 1:
                raise ArithmeticError("behind the first update")

    model = small_model()
    opt = metaopt.build(model.named_parameters(), metaopt.accumulate(2) | metaopt.sgd(lr=0.01) | RaisesOnce())
    opt.metrics()  # from here on somebody reads what is measured
    for loss in (100.0, 100.0, 1.0, 3.0):
        fill_gradients(model, 0)
        opt.record(loss=loss)
        try:
            opt.step()
        except ArithmeticError:
            assert opt.updates == 1
    assert opt.metrics()["train/loss"] == 2.0
