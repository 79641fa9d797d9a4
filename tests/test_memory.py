"""Memory: Lookahead holds one tensor more per parameter, and no step takes for a moment what the weights take."""

import gc

import pytest
import torch

import metaopt
from benchmarks.memory import storage_bytes, watch_memory
from benchmarks.targets import wrappers_alone
from metaopt import Wrapper, adamw, lookahead

pytestmark = pytest.mark.slow

WHOLE = "clip_grad_norm(1.0) | adamw | lookahead(k=5)"


def parameters(dtype=torch.float32, device="cpu"):
    # 16 MiB in float32: far more than a stack may take for a moment, whatever the pieces in which it works
    return [torch.nn.Parameter(torch.randn(512, 1024, device=device).to(dtype)) for _ in range(8)]


def give_gradients(params):
    for p in params:
        p.grad = torch.randn_like(p)


def taken_by_steps(opt, params, steps):
    """Return, for each step, the most bytes that it held beyond those that it found or left behind."""
    device = params[0].device
    found = []
    for _ in range(steps):
        give_gradients(params)
        taken = watch_memory(opt.step, device)
        found.append(taken.peak - max(0, taken.kept))
    return found


def size(params):
    return sum(p.numel() * p.element_size() for p in params)


@pytest.mark.parametrize("base", ["sgd(lr=0.1)", "sgd(lr=0.1, momentum=0.9)", "adamw", "adagrad"])
def test_lookahead_holds_one_tensor_more_per_parameter_and_nothing_else(base):
    keys = []
    for spec in (base, f"{base} | lookahead(k=2)"):
        params = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(3))]
        opt = metaopt.build(params, spec)
        for _ in range(5):
            give_gradients(params)
            opt.step()
        keys.append([set(opt.state.get(p, {})) for p in params])
    for p, bare, wrapped in zip(params, *keys, strict=True):
        assert wrapped - bare == {"lookahead.slow"} and bare <= wrapped
        slow = opt.state[p]["lookahead.slow"]
        assert (slow.shape, slow.dtype, slow.device) == (p.shape, p.dtype, p.device)
        assert slow.untyped_storage().nbytes() == p.numel() * p.element_size()
    groups = [v for entry in opt.param_groups for k, v in entry.items() if k != "params"]
    assert not any(isinstance(value, torch.Tensor) for value in groups)


def test_what_the_steps_leave_allocated_is_the_state(device):
    params = parameters(device=device)
    give_gradients(params)
    opt = metaopt.build(params, WHOLE)
    kept = [watch_memory(opt.step, device).kept for _ in range(11)]
    held = storage_bytes(t for entries in opt.state.values() for t in entries.values())
    assert held == 3 * size(params) + 4 * len(params)
    # the first step makes the state; after it nothing grows but a number here and there
    assert kept[0] == pytest.approx(held, abs=4096)
    assert all(abs(more) < 4096 for more in kept[1:])


@pytest.mark.parametrize(
    "spec",
    [
        WHOLE,
        "adamw | lookahead(k=2) | lookahead(k=4, label='outer')",
        "adamw | lookahead(k=2, pullback_momentum='pullback')",
        "clip_grad_value(0.1) | sgd(lr=0.1) | lookahead(k=2)",
    ],
)
def test_no_step_takes_for_a_moment_as_much_as_the_weights_take(spec, device):
    params = parameters(device=device)
    opt = metaopt.build(params, spec)
    # eleven steps hold the first, which makes the state, and two whole cycles
    assert max(taken_by_steps(opt, params, 11)) < size(params) / 2


@pytest.mark.parametrize("spec", [WHOLE, "adamw | lookahead(k=2) | lookahead(k=4, label='outer')"])
def test_nor_does_a_step_that_is_logged(spec, device, tmp_path):
    params = parameters(device=device)
    opt = metaopt.build(params, spec, log=tmp_path, log_every=1)
    assert max(taken_by_steps(opt, params, 6)) < size(params) / 2


def test_nor_does_a_step_with_slow_weights_of_another_dtype(device):
    params = parameters(torch.bfloat16, device)
    opt = metaopt.build(params, "adamw | lookahead(k=2, slow_dtype='float32')")
    assert max(taken_by_steps(opt, params, 5)) < size(params) / 2


# a wrapper that evaluates the loss itself, as sam does, may keep what it comes back to
ALONE = {name: spec for name, spec, _ in wrappers_alone() if spec is not None}


@pytest.mark.parametrize("name", sorted(ALONE))
def test_nor_does_a_step_of_any_registered_wrapper(name, device):
    params = parameters(device=device)
    opt = metaopt.build(params, ALONE[name])
    # a part that acts on all groups at once after the update needs all the weights from before, and the whole update;
    # mechanic sets aside the base's step as well
    most = {"clip_update_norm": 2.01, "mechanic": 3.01}.get(name, 1.0)
    assert max(taken_by_steps(opt, params, 6)) < most * size(params)


class Wasteful(Wrapper):
    """Copies all weights for a moment: what the tests above must see."""

    def after_update(self, group):
        held = [p.clone() for p in group.params]
        group.set_params(held)


def test_what_an_earlier_profile_saw_and_somebody_releases_in_this_one_is_not_counted() -> None:
    kept: list[torch.Tensor] = []
    watch_memory(lambda: kept.append(torch.ones(1000)))
    taken = watch_memory(lambda: (torch.ones(500), kept.clear()))
    assert (taken.peak, taken.kept) == (2000, 0)


def test_a_wrapper_that_copies_the_weights_is_seen(device):
    params = parameters(device=device)
    opt = metaopt.build(params, adamw | lookahead(k=5) | Wasteful())
    assert max(taken_by_steps(opt, params, 2)) >= size(params)


def test_a_stack_that_is_let_go_leaves_nothing_to_the_cycle_collector() -> None:
    def make_and_step() -> None:
        p = torch.nn.Parameter(torch.zeros(3))
        opt = metaopt.build([p], "clip_grad_norm(1.0) | adamw(lr=cosine(0.1)) | lookahead | ema", total_steps=5)
        p.grad = torch.ones(3)
        opt.step()

    make_and_step()  # imports what the first update imports
    gc.collect()
    gc.disable()
    try:
        make_and_step()
        assert gc.collect() == 0
    finally:
        gc.enable()
