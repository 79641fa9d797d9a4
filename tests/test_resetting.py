"""`reset_state`: what is forgotten begins anew at a parameter's next update, whenever its next gradient comes."""

from collections.abc import Callable

import pytest
import torch

import metaopt

SPECS = [
    "adam(lr=0.1) | lookahead(k=2)",
    "sgd(lr=0.1, momentum=0.9) | ema(0.9)",
    "adam(lr=0.1) | ema(0.9)",
    "adam(lr=0.1) | lookahead(k=2, pullback_momentum='pullback')",
    "adam(lr=0.1) | lookahead(k=2, pullback_momentum='reset')",
    "sgd(lr=0.1) | lookahead(k=2)",
    "adagrad(lr=0.1) | outer(k=2)",
]


class Run:
    """Two parameters, of which the second has no gradient for a while after the moments were reset."""

    def __init__(self, make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]) -> None:
        self.params = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
        self.make = make
        self.opt = make(self.params)

    def steps(self, first: int, last: int, *, saved: bool = False) -> None:
        for step in range(first, last):
            early, late = self.params
            early.grad = torch.full_like(early, 0.5 + step)
            late.grad = None if 3 <= step < 6 else torch.full_like(late, 1.0 + step)
            self.opt.step()
            if saved:
                self.opt.state_dict()


def after_a_reset(spec: str, *, saved: bool = False) -> Run:
    run = Run(lambda params: metaopt.build(params, spec))
    run.steps(0, 3)
    run.opt.reset_state("moments")
    run.steps(3, 9, saved=saved)
    return run


@pytest.mark.parametrize("spec", SPECS)
def test_a_late_gradient_after_a_reset_starts_the_base_there(spec: str) -> None:
    run = after_a_reset(spec)
    assert len({frozenset(held) for held in run.opt.state.values()}) == 1
    if "ema" in spec:  # which leaves the weights to the base: a new one from the reset on
        name, kwargs = ("SGD", {"momentum": 0.9}) if "sgd" in spec else ("Adam", {})
        plain = Run(lambda params: getattr(torch.optim, name)(params, lr=0.1, **kwargs))
        plain.steps(0, 3)
        plain.opt = plain.make(plain.params)
        plain.steps(3, 9)
        torch.testing.assert_close(run.params, plain.params, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("spec", SPECS)
def test_a_state_dict_taken_between_a_reset_and_the_next_gradient_is_whole_and_changes_nothing(spec: str) -> None:
    run = Run(lambda params: metaopt.build(params, spec))
    run.steps(0, 3)
    keys = [set(held) - {"metaopt.anew"} for held in run.opt.state_dict()["state"].values()]
    run.opt.reset_state("moments")
    run.steps(3, 5)
    assert [set(held) - {"metaopt.anew"} for held in run.opt.state_dict()["state"].values()] == keys
    run.steps(5, 9, saved=True)
    torch.testing.assert_close(run.params, after_a_reset(spec).params, rtol=0, atol=0)
