"""State that is gathered before a parameter's first update: nothing of it is lost, whenever gradients come (law 16)."""

import copy
from collections.abc import Sequence

import pytest
import torch
from small_runs import assert_same

import metaopt

BASES = ["sgd(lr=1.0)", "sgd(lr=1.0, momentum=0.9)", "adamw(lr=0.1, weight_decay=0.0)", "adagrad(lr=0.1)"]


def run(spec: str, patterns: Sequence[tuple[bool, ...]], *, through_checkpoints: bool = False) -> list[torch.Tensor]:
    """Make the steps in which the parameters have gradients as each pattern says; return where they end."""
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in patterns[0]]
    opt = metaopt.build(params, spec)
    for step, pattern in enumerate(patterns):
        for p, has_gradient in zip(params, pattern, strict=True):
            p.grad = torch.full((2,), 1.0 + step) if has_gradient else None
        opt.step()
        if through_checkpoints:
            saved = copy.deepcopy(opt.state_dict())
            params = [torch.nn.Parameter(p.detach().clone()) for p in params]
            opt = metaopt.build(params, spec)
            opt.load_state_dict(saved)
    return [p.detach() for p in params]


def mean_gradients(spec: str, patterns: Sequence[tuple[bool, ...]], window: int) -> list[torch.Tensor]:
    """Return where the bare stack ends with the means over windows, a gradient once seen counting as 0 later."""
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in patterns[0]]
    opt = metaopt.build(params, spec)
    seen = [False] * len(params)
    for first in range(0, len(patterns), window):
        for i, p in enumerate(params):
            members = [1.0 + step for step in range(first, first + window) if patterns[step][i]]
            seen[i] = seen[i] or bool(members)
            p.grad = torch.full((2,), sum(members) / window) if seen[i] else None
        opt.step()
    return [p.detach() for p in params]


PATTERNS = {
    "one, then the other": [(True, False), (False, True)] * 4,
    "the second from the second window on": [(True, False)] * 2 + [(False, True), (True, False)] * 3,
    "the second once, early": [(True, True), (True, False)] + [(True, False)] * 6,
    "the second once, late": [(True, False)] * 6 + [(False, True), (True, False)],
}


@pytest.mark.parametrize("patterns", PATTERNS.values(), ids=PATTERNS.keys())
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("behind", ["", " | lookahead(k=2)", " | lookahead(k=2, pullback_momentum='reset')"])
def test_accumulation_is_the_mean_whichever_parameter_has_a_gradient_when(
    base: str, behind: str, patterns: list[tuple[bool, ...]]
) -> None:
    found = run(f"accumulate(2) | {base}{behind}", patterns)
    torch.testing.assert_close(found, mean_gradients(f"{base}{behind}", patterns, 2))


@pytest.mark.parametrize("patterns", PATTERNS.values(), ids=PATTERNS.keys())
@pytest.mark.parametrize("base", BASES)
def test_what_was_gathered_survives_a_checkpoint_at_every_step(base: str, patterns: list[tuple[bool, ...]]) -> None:
    spec = f"accumulate(2) | {base} | lookahead(k=2)"
    assert_same(run(spec, patterns, through_checkpoints=True), run(spec, patterns))
