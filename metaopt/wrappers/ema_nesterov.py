"""Nesterov's step ahead along an average of the latest updates."""

import torch

from metaopt import Example, Group, Wrapper, hookimpl, hyper, scalar, zeros


class EmaNesterov(Wrapper, elementwise=True):
    """x' = x + beta m + u; m' = gamma m + (1 - gamma) (x' - x), u being the base's step at x + beta m. arXiv:2605.25395

    The weights are x + beta m, where gradients are taken; `opt.averaged()` shows x. The paper lets beta follow the
    base's schedule and sets it to 0 in a warm-up and at the end of a run, as
    `beta=sequence(0.0, 1000, 0.5, 4000, 0.0)` does. A beta of update t moves the weights ahead for update t + 1.
    """

    known_as = ("EMA-Nesterov", "EMA_Nesterov")

    beta: float = hyper(0.5, ge=0.0, doc="how far along m gradients are taken", known_as=("lookahead_stepsize",))
    gamma: float = hyper(0.99, ge=0.0, lt=1.0, doc="how much of m an update keeps", known_as=("lookahead_ema",))
    direction_dtype: str | None = hyper(
        None,
        choices=(None, "float32"),
        doc="the dtype of m; None: the parameter's own, in 16 bits too coarse for a gamma near 1",
        defines_state=True,
    )
    direction = zeros(dtype="direction_dtype")
    ahead = scalar(0.0, doc="the beta in the weights before the last update")
    next_ahead = scalar(0.0, doc="the beta in the weights")
    moved = scalar(0.0, doc="the last update that moved the weights")

    def on_update(self, group: Group) -> None:
        number = group.updates + 1
        # a group may come in several lists, and all of them need the beta of the update before
        group.ahead.copy_(torch.where(group.moved < number, group.next_ahead, group.ahead))
        group.next_ahead.fill_(group.beta)
        group.moved.fill_(number)
        # x' - x = u + ahead m
        torch._foreach_mul_(group.direction, group.gamma + (1.0 - group.gamma) * group.ahead)
        torch._foreach_add_(group.direction, group.update, alpha=1.0 - group.gamma)
        torch._foreach_add_(group.update, group.direction, alpha=group.beta)

    def averaged(self, group: Group) -> list[torch.Tensor]:
        way = torch._foreach_mul(group.direction, group.next_ahead)
        return list(torch._foreach_sub(group.params, way))


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"ema_nesterov": EmaNesterov}


@hookimpl
def metaopt_examples() -> dict[str, list[Example]]:
    return {
        "ema_nesterov": [Example("ema_nesterov(gamma=0.9)"), Example("ema_nesterov(direction_dtype='float32')")],
    }
