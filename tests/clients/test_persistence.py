"""deepcopy, pickle, torch.save and torch.load: from any step, inside averaged() too, in a new process."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import resume_worker
import torch
import warm
from small_runs import assert_same, assert_same_weights, loss_of, small_model, through_a_file, train, weights

import metaopt

STEPS = 10
SPECS = [
    "clip_grad_norm(0.5) | adamw(lr=0.01) | lookahead(k=3)",
    "sgd(lr=warmup(cosine(0.1), 3), momentum=0.9) | lookahead(k=3, pullback_momentum='pullback')",
    "adagrad(lr=0.1) | lookahead(k=2, pullback_momentum='reset')",
    "adamw(lr=0.01) | ema(0.9)",
    "accumulate(2) | adamw(lr=0.01) | outer(k=2)",
    "sgd(lr=0.1) | lookahead(k=2, alpha=warmup(constant(0.5), 4))",
    "lbfgs(lr=0.1, max_iter=2) | lookahead(k=2)",
]


def made(spec: str, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, metaopt.Stack]:
    model = small_model(dtype=dtype)
    return model, metaopt.build(model.named_parameters(), spec, total_steps=STEPS)


def advance(model: torch.nn.Module, opt: metaopt.Stack, steps: range) -> None:
    if "lbfgs" not in str(opt.spec):
        train(model, opt, steps)
        return
    for step in steps:
        train(model, opt, [step], call=lambda step=step: opt.step(closure(model, opt, step)))


def closure(model: torch.nn.Module, opt: Any, step: int) -> Any:
    def evaluate() -> torch.Tensor:
        opt.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        return loss

    return evaluate


@pytest.mark.parametrize("spec", SPECS)
def test_a_checkpoint_needs_weights_only_and_holds_everything(spec: str) -> None:
    model, opt = made(spec)
    for step in range(STEPS):
        saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
        twin, again = made(spec)
        twin.load_state_dict(saved["model"])
        again.load_state_dict(saved["opt"])
        assert again.load_report is not None
        assert not again.load_report.fresh
        assert not again.load_report.dropped
        assert_same(again.state_dict(), opt.state_dict())
        advance(twin, again, range(step, step + 2))
        advance(model, opt, range(step, step + 1))
        ahead, other = copy.deepcopy((model, opt))
        advance(ahead, other, range(step + 1, step + 2))
        assert_same_weights(twin, ahead)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("spec", SPECS)
def test_a_copy_from_any_step_goes_on_like_the_original(spec: str, copied: Any) -> None:
    model, opt = made(spec)
    twins = []
    for step in range(6):
        twins.append((step, *copied((model, opt))))
        advance(model, opt, range(step, step + 1))
    for step, twin, other in twins:
        assert other.state is other.base.state
        assert other.param_groups is other.base.param_groups
        advance(twin, other, range(step, 6))
        assert_same_weights(twin, model)
        assert_same(other.state_dict(), opt.state_dict())


AVERAGING = [spec for spec in SPECS if "ema" in spec or "lookahead" in spec or "outer" in spec]


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("spec", AVERAGING)
def test_a_copy_made_inside_averaged_goes_on_from_the_fast_weights(spec: str, copied: Any) -> None:
    model, opt = made(spec)
    for step in range(5):
        with opt.averaged():
            twin, other = copied((model, opt))
            assert_same_weights(twin, model)
        ahead, plain = copied((model, opt))
        advance(twin, other, range(step, step + 3))
        advance(ahead, plain, range(step, step + 3))
        assert_same_weights(twin, ahead)
        advance(model, opt, range(step, step + 1))


@pytest.mark.parametrize("model_first", [True, False], ids=["model first", "optimizer first"])
@pytest.mark.parametrize("spec", AVERAGING)
def test_a_checkpoint_taken_inside_averaged_goes_on_from_the_fast_weights(spec: str, model_first: bool) -> None:
    model, opt = made(spec)
    for step in range(5):
        with opt.averaged():
            saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
        twin, again = made(spec)
        if model_first:
            twin.load_state_dict(saved["model"])
        again.load_state_dict(saved["opt"])
        if not model_first:
            twin.load_state_dict(saved["model"])
        advance(twin, again, range(step, step + 3))
        ahead, plain = copy.deepcopy((model, opt))
        advance(ahead, plain, range(step, step + 3))
        assert_same_weights(twin, ahead)
        advance(model, opt, range(step, step + 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", ["clip_grad_norm(0.5) | adamw(lr=0.01) | lookahead(k=3)", "sgd(lr=0.1, momentum=0.9) | ema(0.9)"]
)
def test_saved_inside_averaged_at_every_step_and_resumed_in_a_new_process(spec: str, tmp_path: Path) -> None:
    expected = resume_worker.save_at_every_step(spec, tmp_path / "saved.pt", metaopt.Stack.averaged)
    found = warm.called(resume_worker.resume_from_every_step, tmp_path / "saved.pt")
    # the last was saved when nothing was left to do: no step swaps it back, it shows the average
    assert found.pop(resume_worker.STEPS) != expected
    for step, resumed in found.items():
        assert resumed == expected, f"saved at step {step}"


def test_zero_grad_between_forward_and_backward_after_such_a_load_breaks_no_graph() -> None:
    spec = "adamw(lr=0.01) | lookahead(k=3)"
    model, opt = made(spec)
    train(model, opt, range(4))
    fast = weights(model)
    with opt.averaged():
        opt.zero_grad()  # inside, the average stays
        slow = weights(model)
        saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
    assert not torch.equal(slow[0], fast[0])
    twin, again = made(spec)
    twin.load_state_dict(saved["model"])
    again.load_state_dict(saved["opt"])
    assert_same(weights(twin), slow)  # until training goes on: it may have been loaded for an evaluation
    loss = loss_of(twin, 4)
    again.zero_grad()
    assert_same(weights(twin), fast)
    loss.backward()
    again.step()
    assert again.updates == 5


def test_an_error_inside_averaged_still_gives_the_fast_weights_back() -> None:
    model, opt = made("adamw(lr=0.01) | lookahead(k=3)")
    train(model, opt, range(4))
    fast = weights(model)
    with pytest.raises(ZeroDivisionError), opt.averaged():
        raise ZeroDivisionError
    assert_same(weights(model), fast)
    train(model, opt, range(4, 6))


def test_a_checkpoint_loaded_inside_averaged_is_what_the_run_goes_on_from() -> None:
    spec = "adamw(lr=0.01) | lookahead(k=3)"
    model, opt = made(spec)
    train(model, opt, range(4))
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    train(model, opt, range(4, 7))
    with opt.averaged():
        model.load_state_dict(saved[0])
        opt.load_state_dict(saved[1])
    train(model, opt, range(4, 8))
    twin, plain = made(spec)
    train(twin, plain, range(8))
    assert_same_weights(model, twin)


class Debiased(metaopt.Wrapper):
    """average <- 0.9 average + 0.1 w from zero; what is shown is worked out: average / (1 - 0.9^t)."""

    sum = metaopt.zeros()

    def after_update(self, group: metaopt.Group) -> None:
        torch._foreach_lerp_(group.sum, group.params, 0.1)

    def averaged(self, group: metaopt.Group) -> list[torch.Tensor]:
        return list(torch._foreach_div(group.sum, 1.0 - 0.9**group.updates))


def test_an_average_that_is_worked_out_is_shown_and_the_fast_weights_come_back() -> None:
    def debiased() -> tuple[torch.nn.Module, metaopt.Stack]:
        model = small_model()
        return model, metaopt.build(model.named_parameters(), metaopt.adamw(lr=0.01) | Debiased())

    model, opt = debiased()
    train(model, opt, range(3))
    fast, sums = weights(model), [opt.state[p]["debiased.sum"].clone() for p in model.parameters()]
    with opt.averaged():
        torch.testing.assert_close(weights(model), [s / (1.0 - 0.9**3) for s in sums])
        saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
    assert_same(weights(model), fast)
    assert_same([opt.state[p]["debiased.sum"] for p in model.parameters()], sums)
    assert not any(key.endswith(".fast") for held in opt.state.values() for key in held)
    twin, again = debiased()
    twin.load_state_dict(saved["model"])
    again.load_state_dict(saved["opt"])
    train(model, opt, range(3, 6))
    train(twin, again, range(3, 6))
    assert_same_weights(twin, model)


def test_an_average_that_cannot_be_shown_whole_is_not_shown_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model, opt = made("adamw(lr=0.01) | lookahead(k=5)")
    train(model, opt, range(3))
    fast, state = weights(model), copy.deepcopy(opt.state_dict())
    swapped = []

    def out_of_memory_at_the_third(a: torch.Tensor, b: torch.Tensor) -> None:
        swapped.append(a)
        if len(swapped) == 3:
            raise MemoryError
        swap(a, b)

    swap = metaopt.engine.averages.swap
    monkeypatch.setattr(metaopt.engine.averages, "swap", out_of_memory_at_the_third)
    with pytest.raises(MemoryError), opt.averaged():
        raise AssertionError("the context is not entered")
    assert_same(weights(model), fast)
    assert_same(opt.state_dict(), state)
    monkeypatch.undo()
    train(model, opt, range(3, 5))


def test_an_empty_stack_saved_before_its_first_step_starts_as_a_fresh_one() -> None:
    spec = "adagrad(lr=0.1) | lookahead(k=2)"
    model, opt = made(spec)
    saved = through_a_file(opt.state_dict())
    assert saved["state"] == {}
    train(model, opt, range(3))
    opt.load_state_dict(saved)  # the run is taken back to its beginning
    model.load_state_dict(small_model().state_dict())
    train(model, opt, range(5))
    twin, plain = made(spec)
    train(twin, plain, range(5))
    assert_same_weights(model, twin)


def test_loading_twice_is_loading_once() -> None:
    spec = "clip_grad_norm(0.5) | adamw(lr=0.01) | lookahead(k=3)"
    model, opt = made(spec)
    train(model, opt, range(4))
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    twin, again = made(spec)
    for _ in range(2):
        twin.load_state_dict(saved[0])
        again.load_state_dict(copy.deepcopy(saved[1]))
        assert_same(again.state_dict(), opt.state_dict())
    train(model, opt, range(4, 8))
    train(twin, again, range(4, 8))
    assert_same_weights(twin, model)


@pytest.mark.parametrize("names", [(), ("averages",), ("moments",), ("counters",)])
@pytest.mark.parametrize("spec", ["sgd(lr=1.0) | ema(0.5)", "sgd(lr=1.0) | lookahead(k=3)"])
def test_what_is_reset_after_such_a_load_is_not_the_fast_weights(spec: str, names: tuple[str, ...]) -> None:
    model, opt = made(spec)
    advance(model, opt, range(4))
    with opt.averaged():
        saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
    twin, again = made(spec)
    twin.load_state_dict(saved["model"])
    again.load_state_dict(saved["opt"])
    for m, o in ((model, opt), (twin, again)):
        o.reset_state(*names)
        advance(m, o, range(4, 9))
    assert_same_weights(model, twin)
