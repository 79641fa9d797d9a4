"""Magma: random tensors rest, and the others move as far as gradient and momentum agree."""

import torch

from metaopt import Group, Wrapper, hookimpl, hyper, scalar, zeros


class Magma(Wrapper):
    """s <- 0.9 s + 0.1 sigmoid(cos(m, g) / tau); u <- s u with probability `keep`, otherwise 0. arXiv:2602.15322

    u is one tensor's update, with what the base decays; m <- beta m + (1 - beta) g is its momentum, which is that of
    Adam if beta is its beta1. s begins at 1, and 0.9 is `smoothing`. The base's own state goes on as if nothing were
    masked. The paper masks attention and dense layers: a group of the others, such as embeddings, may have `keep=1`.
    """

    known_as = ("Momentum-aligned gradient masking", "masked updates")

    keep: float = hyper(
        0.5, gt=0.0, le=1.0, doc="the probability that a tensor moves", known_as=("mask_prob", "survival_prob")
    )
    tau: float = hyper(2.0, gt=0.0, doc="the temperature of the agreement")
    smoothing: float = hyper(0.9, ge=0.0, lt=1.0, doc="how much of s an update keeps", known_as=("alignment_ema",))
    beta: float = hyper(0.9, ge=0.0, lt=1.0, doc="how much of m an update keeps", known_as=("momentum_beta",))
    seed: int = hyper(0, ge=0, doc="the seed of the masks", per_group=False)
    momentum = zeros()
    score = scalar(1.0, per="parameter")

    def on_update(self, group: Group) -> None:
        gradients, momentum, scores = group.grads, group.momentum, group.score
        torch._foreach_lerp_(momentum, gradients, 1.0 - group.beta)
        targets = torch.sigmoid(_cosines(group, momentum, gradients) / group.tau).to(scores[0].dtype)
        torch._foreach_lerp_(scores, list(targets.unbind()), 1.0 - group.smoothing)
        coins = group.stack(group.random_like(scores, "uniform")) < group.keep
        group.multiply(group.update, group.stack(scores) * coins)


def _cosines(group: Group, left: list[torch.Tensor], right: list[torch.Tensor]) -> torch.Tensor:
    """Return the cosine between two tensors each, from what their directions add up to; 0 if one is zero."""
    ways = []
    for tensors in (left, right):
        sizes = group.stack(group.norms(tensors))
        ways.append(group.multiples(tensors, torch.where(sizes == 0, 1.0, sizes).reciprocal()))
    both = torch._foreach_add(*ways), torch._foreach_sub(*ways)
    sums, differences = (group.stack(group.norms(list(each))).square() for each in both)
    return (sums - differences) / 4.0


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"magma": Magma}
