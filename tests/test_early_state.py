"""State that is gathered before a parameter's first update: nothing of it is lost, whenever gradients come (law 16)."""

import copy
from collections.abc import Sequence

import pytest
import torch
from small_runs import assert_same
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

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


@pytest.mark.parametrize("through", ["the step", "its checkpoint"])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("base", ["sgd(lr=0.1, weight_decay=0.1)", "adamw(lr=0.1)"])
def test_a_template_step_gathers_nothing_for_a_parameter_that_never_has_a_gradient(
    base: str, steps: int, through: str
) -> None:
    spec = f"accumulate({steps}) | {base} | lookahead(k=2)"
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = metaopt.build([used, unused], spec)
    get_optimizer_state_dict(torch.nn.ParameterList([used, unused]), opt)
    assert opt.state and opt.updates == 0
    if through == "its checkpoint":
        saved = copy.deepcopy(opt.state_dict())
        opt = metaopt.build([used, unused], spec)
        opt.load_state_dict(saved)
    for _ in range(3 * steps):
        used.grad = torch.ones(2)
        opt.step()
    assert opt.updates == 3 and unused not in opt.state
    assert torch.equal(unused.detach(), torch.ones(2))


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


def test_what_a_base_counts_in_its_groups_begins_at_the_first_update_whenever_the_gradients_came() -> None:
    class Counting(torch.optim.SGD):
        """SGD that counts its steps in its groups, from the first one on."""

        def step(self, closure=None):
            for group in self.param_groups:
                group["steps"] = group.get("steps", 0) + 1
            return super().step(closure)

    first, second = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    opt = metaopt.wrap(Counting([first, second], lr=0.1), "accumulate(2)")
    for window in range(1, 3):
        for p in (first, second):  # each has its first gradient in another step
            p.grad = torch.ones(2)
            opt.step()
        assert opt.param_groups[0]["steps"] == opt.updates == window
