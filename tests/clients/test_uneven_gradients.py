"""Gradients come and go per parameter: a run saved and resumed anywhere is still the uninterrupted one, bit for bit."""

import copy
import itertools
import random

import pytest
import torch
from small_runs import assert_same

import metaopt

pytestmark = pytest.mark.slow

BASES = [
    "sgd(lr=0.1)",
    "sgd(lr=0.1, momentum=0.9)",
    "adamw(lr=0.01)",
    "adagrad(lr=0.1)",
    "rmsprop(lr=0.01)",
    "nadam(lr=0.01)",
    "adadelta",
    "asgd(lr=0.1)",
]
BEHIND = [
    "lookahead(k=2)",
    "lookahead(k=3, pullback_momentum='pullback')",
    "lookahead(k=2, pullback_momentum='reset')",
    "ema(0.9)",
    "outer(k=2)",
    "cautious | lookahead(k=2)",
]
BEFORE = ["", "clip_grad_norm(0.3) | ", "accumulate(2) | ", "skip_nonfinite(9) | accumulate(3) | "]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SHAPES = [(3, 2), (2,), (1,), ()]
STEPS = 8


def built(spec: str, values: list[torch.Tensor]) -> tuple[list[torch.nn.Parameter], metaopt.Stack]:
    params = [torch.nn.Parameter(value.detach().clone()) for value in values]
    return params, metaopt.build([{"params": params[:2]}, {"params": params[2:]}], spec)


def make_step(params: list[torch.nn.Parameter], opt: metaopt.Stack, pattern: list[bool], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p, has_gradient in zip(params, pattern, strict=True):
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype) if has_gradient else None
    opt.step()


@pytest.mark.parametrize(("base", "behind"), list(itertools.product(BASES, BEHIND)))
def test_a_run_with_uneven_gradients_resumes_bit_for_bit(base: str, behind: str) -> None:
    number = BASES.index(base) * len(BEHIND) + BEHIND.index(behind)
    for seed in range(3):
        chance = random.Random(3 * number + seed)
        spec = f"{BEFORE[(number + seed) % len(BEFORE)]}{base} | {behind}"
        generator = torch.Generator().manual_seed(1)
        start = [torch.randn(shape, generator=generator).to(DTYPES[seed]) for shape in SHAPES]
        alone, plain = built(spec, start)
        params, opt = built(spec, start)
        for step in range(STEPS):
            pattern = [chance.random() < 0.6 for _ in SHAPES]
            make_step(alone, plain, pattern, step)
            make_step(params, opt, pattern, step)
            if chance.random() < 0.6:
                saved = copy.deepcopy(opt.state_dict())
                params, opt = built(spec, [p.detach() for p in params])
                opt.load_state_dict(saved)
        assert_same([p.detach() for p in params], [p.detach() for p in alone], spec)
        assert_same(opt.state_dict(), plain.state_dict(), spec)
