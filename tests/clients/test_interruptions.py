"""Whatever clients do between the steps, in whatever order, the run is the one that nobody touched, bit for bit."""

import copy
import io
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import assert_same, assert_same_weights, small_model, train, weights

import metaopt

pytestmark = pytest.mark.slow

STEPS = 8
SPECS = [
    "clip_grad_norm(0.5) | adamw(lr=0.01) | lookahead(k=2) | ema(0.9)",
    "sgd(lr=warmup(cosine(0.1), 3), momentum=0.9) | lookahead(k=3, pullback_momentum='pullback')",
    "adagrad(lr=0.1) | lookahead(k=2, pullback_momentum='reset')",
    "accumulate(2) | clip_grad_value(0.1) | rmsprop(lr=0.01) | outer(k=2)",
    "partition({'*weight': muon(lr=0.01) | lookahead(k=2), '*': sgd(lr=0.05, momentum=0.9)}) | ema(0.9)",
    "adamw(lr=cosine(0.01)) | lookahead(k=2) | lookahead(k=4, label='outer')",
]
Run = tuple[torch.nn.Module, metaopt.Stack]


def made(spec: str, seed: int = 0) -> Run:
    model = small_model(seed)
    return model, metaopt.build(model.named_parameters(), spec, total_steps=STEPS)


def averages(opt: metaopt.Stack) -> list[str]:
    return list(
        dict.fromkeys(w.label for chain in opt.chains for w in chain.ordered if "averaged" in w.implemented_hooks())
    )


def saved_and_resumed(spec: str, run: Run) -> Run:
    model, opt = run
    return _resumed(spec, model, opt)


def saved_inside_averaged(spec: str, run: Run) -> Run:
    model, opt = run
    with opt.averaged(averages(opt)[-1]):
        return _resumed(spec, model, opt)


def _resumed(spec: str, model: torch.nn.Module, opt: metaopt.Stack) -> Run:
    buffer = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), buffer)
    buffer.seek(0)
    weights_then, state = torch.load(buffer, weights_only=True)
    fresh, again = made(spec, seed=1)
    again.load_state_dict(state)
    fresh.load_state_dict(weights_then)
    return fresh, again


def copied(spec: str, run: Run) -> Run:
    return copy.deepcopy(run)


def pickled_inside_averaged(spec: str, run: Run) -> Run:
    with run[1].averaged(averages(run[1])[0]):
        found: Run = pickle.loads(pickle.dumps(run))
    return found


def looked_at(spec: str, run: Run) -> Run:
    model, opt = run
    for label in averages(opt):
        with torch.no_grad(), opt.averaged(label):
            model(torch.ones(1, 3))
    str(opt.spec), repr(opt), opt.metrics(), opt.state_dict()
    return run


def loaded_inside_another_average(spec: str, run: Run) -> Run:
    model, opt = run
    first, last = averages(opt)[0], averages(opt)[-1]
    with opt.averaged(first):
        saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    with opt.averaged(last):
        model.load_state_dict(saved[0])
        opt.load_state_dict(saved[1])
    return run


def stepped_without_gradients(spec: str, run: Run) -> Run:
    model, opt = run
    model.zero_grad()
    opt.step()
    assert opt.skipped == "no gradients"
    return run


def failed_in_the_closure(spec: str, run: Run) -> Run:
    def closure() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        run[1].step(closure)
    return run


def refused_a_checkpoint(spec: str, run: Run) -> Run:
    state = copy.deepcopy(run[1].state_dict())
    state["param_groups"][-1]["params"].append(99)
    with pytest.raises(metaopt.CheckpointError):
        run[1].load_state_dict(state)
    return run


def rebound(spec: str, run: Run) -> Run:
    _, opt = run
    opt.state = defaultdict(dict, {p: dict(held) for p, held in opt.state.items()})
    opt.param_groups = [dict(entry) for entry in opt.param_groups]
    return run


def infinite_under_a_scaler(spec: str, run: Run) -> Run:
    model, opt = run
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(torch.ones(1, 3)).sum() * torch.inf).backward()
    scaler.step(opt)
    return run


INTERRUPTIONS: list[Callable[[str, Run], Run]] = [
    saved_and_resumed,
    saved_inside_averaged,
    copied,
    pickled_inside_averaged,
    loaded_inside_another_average,
    looked_at,
    stepped_without_gradients,
    failed_in_the_closure,
    refused_a_checkpoint,
    rebound,
    infinite_under_a_scaler,
]
plans = st.lists(st.lists(st.sampled_from(INTERRUPTIONS), max_size=3), min_size=STEPS, max_size=STEPS)


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(plan=plans)
def test_interrupted_in_any_way_at_any_step(spec: str, plan: Any) -> None:
    model, plain = made(spec)
    train(model, plain, range(STEPS))
    run = made(spec)
    for step, interruptions in enumerate(plan):
        for interrupt in interruptions:
            run = interrupt(spec, run)
        train(*run, [step])
    assert_same_weights(run[0], model)
    assert_same(run[1].state_dict(), plain.state_dict())
    assert run[1].updates == plain.updates


@pytest.mark.parametrize("interrupt", INTERRUPTIONS, ids=lambda interrupt: interrupt.__name__)
@pytest.mark.parametrize("spec", SPECS)
def test_interrupted_in_one_way_before_every_step(spec: str, interrupt: Callable[[str, Run], Run]) -> None:
    model, plain = made(spec)
    run = made(spec)
    for step in range(STEPS):
        run = interrupt(spec, run)
        train(*run, [step])
        train(model, plain, [step])
        assert_same(weights(run[0]), weights(model))
    assert_same(run[1].state_dict(), plain.state_dict())
