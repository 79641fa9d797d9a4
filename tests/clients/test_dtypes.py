"""Checkpoints and dtypes: state goes along into another, and comes back unrounded into its own."""

import copy
import pickle

import pytest
import torch
from small_runs import assert_same, assert_same_weights, small_model, through_a_file, train

import metaopt

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


def made(spec: str, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, metaopt.Stack]:
    model = small_model(dtype=dtype)
    return model, metaopt.build(model.named_parameters(), spec)


@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16])
def test_another_dtype_takes_the_state_along(other: torch.dtype) -> None:
    model, opt = made("adamw(lr=0.01) | lookahead(k=3)")
    train(model, opt, range(4))
    twin, again = made("adamw(lr=0.01) | lookahead(k=3)", other)
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        held = again.state[q]
        for key in ("exp_avg", "exp_avg_sq", "lookahead.slow"):
            assert_same(held[key], opt.state[p][key].to(other))
        assert held["step"].dtype == torch.float32
    train(twin, again, range(4, 8))
    assert all(torch.isfinite(p).all() for p in twin.parameters())


@pytest.mark.parametrize("base", ["nadam", "asgd"])
def test_numbers_that_a_base_keeps_in_float32_beside_16_bit_weights_come_back_unrounded(base: str) -> None:
    # torch's own load rounds them
    model, opt = made(f"{base}(lr=0.01) | lookahead(k=2)", torch.bfloat16)
    train(model, opt, range(3))
    twin, again = made(f"{base}(lr=0.01) | lookahead(k=2)", torch.bfloat16)
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(through_a_file(opt.state_dict()))
    assert_same(again.state_dict(), opt.state_dict())
    train(model, opt, range(3, 6))
    train(twin, again, range(3, 6))
    assert_same_weights(twin, model)


@pytest.mark.parametrize("taken", ["deepcopy", "pickle", "file", "inside averaged"])
def test_float32_slow_weights_of_a_bfloat16_model_come_back_unrounded(taken: str) -> None:
    spec = "sgd(lr=0.1, momentum=0.9) | lookahead(k=2, slow_dtype='float32') | ema(0.9, average_dtype='float32')"
    model, opt = made(spec, torch.bfloat16)
    train(model, opt, range(5))
    if taken in COPIES:
        twin, again = COPIES[taken]((model, opt))
    else:
        twin, again = made(spec, torch.bfloat16)
        if taken == "file":
            saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
        else:
            with opt.averaged("ema"):
                saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
        twin.load_state_dict(saved["model"])
        again.load_state_dict(saved["opt"])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for key in ("lookahead.slow", "ema.average"):
            assert again.state[q][key].dtype == torch.float32
            assert not torch.equal(opt.state[p][key], opt.state[p][key].bfloat16().float())
            assert_same(again.state[q][key], opt.state[p][key])
    train(model, opt, range(5, 9))
    train(twin, again, range(5, 9))
    assert_same_weights(twin, model)
