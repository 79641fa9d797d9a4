"""The wrappers of the family where it is narrow: no gradient, extreme numbers, other signs, groups, schedules, loads."""

import math
from collections.abc import Callable

import torch

import metaopt


def closure_of(x: torch.nn.Parameter, gradient: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Return a closure that sets the gradient by a formula."""

    def closure() -> torch.Tensor:
        x.grad = gradient(x.detach())
        return torch.zeros(())

    return closure


def test_a_clip_of_a_skipped_update_does_not_reach_the_next_one() -> None:
    x = torch.nn.Parameter(torch.ones(2))
    opt = metaopt.build([x], "sam | clip_grad_norm(1.0) | skip_nonfinite(5) | sgd(lr=0.1)")
    opt.step(closure_of(x, lambda w: torch.tensor([math.nan, 1.0])))
    assert opt.skipped is not None
    opt.step(closure_of(x, lambda w: 2 * w))
    assert opt.skipped is None and opt.updates == 1
    assert torch.isfinite(x).all()
