"""Cautious updates: only where the update goes down the gradient."""

import torch
from torch import Tensor

from metaopt import Group, Wrapper, elementwise, hookimpl


class Cautious(Wrapper):
    """u <- u m / max(mean(m), 0.001), m = 1 where u g < 0 and otherwise 0, for each tensor's update u. arXiv:2411.16085

    u is the whole change that the base makes: a decay of the weights inside it is masked as well, one that is written
    before the base, as `decay(0.1) | adam | cautious`, is not. Behind a Lookahead u has the pull in it: write the
    Lookahead behind this. If the base maximizes, m = 1 where u g > 0. Complex components agree by their angle.
    """

    known_as = ("C-AdamW", "C-Lion", "caution", "cautious optimizer")

    @elementwise
    @staticmethod
    def mask(update: Tensor, grad: Tensor, *, way: float) -> dict[str, Tensor]:
        # an update has 32 bits or more, so that the product of two small numbers is not zero
        agrees = ((update * grad.conj()).real * way < 0) * 1.0
        return {"update": update * agrees * torch.reciprocal(torch.clamp(torch.mean(agrees), min=1e-3))}

    def on_update(self, group: Group) -> None:
        self.mask(group, way=-1.0 if group.maximize else 1.0)


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"cautious": Cautious}
