"""Mechanic: the learning rate is learned while the base runs."""

import torch

from metaopt import Example, Groups, Wrapper, hookimpl, hyper, previous, scalar, start


class Mechanic(Wrapper):
    """x <- x_0 + s (D + u), D = (x_before - x_0) / s_before the way so far, u the base's update. arXiv:2306.00144

    s = s_1 + ... + s_n, one for each memory b_i = 1 - 10^-i. With h = -<g + weight_decay s |g| / |x| x, D>, which tells
    how far the way so far has gone down: r_i <- b_i r_i + s_i min(max(h, -m_i), m_i), m_i <- max(b_i m_i, |h| + eps),
    v_i <- b_i^2 v_i + h^2, s_i <- (s_init m_i / n + max(r_i, 0)) / (sqrt(v_i) + eps). Norms and products are over all
    parameters with a gradient; others stay where they are. Give the base the rate 1, or a schedule from 1. In 16 bits
    weights cannot take steps as small as the first ones.
    """

    known_as = ("mechanize", "learning rate tuner", "parameter-free learning rate")

    s_init: float = hyper(1e-6, gt=0.0, doc="the first scale of the updates", per_group=False)
    num_betas: int = hyper(6, ge=1, le=12, doc="how many memories bet on the scale", defines_state=True)
    eps: float = hyper(1e-8, gt=0.0, doc="keeps quotients finite", per_group=False)
    weight_decay: float = hyper(
        1e-2, ge=0.0, doc="how strongly h counts the weights' own size, unlike the base's decay", per_group=False
    )
    origin = start()
    before = previous()
    # r and s in units of s_init
    reward = scalar(0.0, size="num_betas", per="run")
    largest = scalar(0.0, size="num_betas", per="run")
    squares = scalar(0.0, size="num_betas", per="run")
    bets = scalar(1.0, size="num_betas", per="run")

    def after_updates(self, groups: Groups) -> None:
        pieces = list(groups)
        steps = [group.copies(group.update) for group in pieces]
        for group in pieces:
            # the way so far, where the engine can take its norms and products
            torch._foreach_copy_(group.update, group.before)
            group.add(group.update, group.origin, alpha=-1.0)
        total = groups.s_init * groups.bets.sum()
        _bet(groups, _descent(groups, total, up=pieces[0].maximize))
        scale = groups.s_init * groups.bets.sum()
        for group, step in zip(pieces, steps, strict=True):
            device = step[0].device
            torch._foreach_mul_(group.update, (scale / (total + groups.eps) - 1.0).to(device))
            torch._foreach_mul_(step, scale.to(device))
            torch._foreach_add_(group.update, step)


def _descent(groups: Groups, total: torch.Tensor, *, up: bool) -> torch.Tensor:
    """Return h; `update` holds the way so far times `total`."""
    decay = groups.weight_decay * total * groups.norm_of("grads") / (groups.norm_of("before") + groups.eps)
    rise = groups.dot("grads", "update")
    h = (rise if up else -rise) - decay * groups.dot("before", "update")
    descent: torch.Tensor = (h / (total + groups.eps)).to(total)
    return descent


def _bet(groups: Groups, h: torch.Tensor) -> None:
    n, m, r = groups.num_betas, groups.largest, groups.reward
    betas = 1.0 - 0.1 ** torch.arange(1, n + 1, dtype=m.dtype, device=m.device)
    r.mul_(betas).add_(torch.minimum(torch.maximum(h, -m), m).mul_(groups.bets))
    m.copy_(torch.maximum(betas * m, h.abs() + groups.eps))
    groups.squares.mul_(betas.square()).add_(h.square())
    groups.bets.copy_((m / n + r.clamp(min=0.0)) / (groups.squares.sqrt() + groups.eps))


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"mechanic": Mechanic}


@hookimpl
def metaopt_examples() -> dict[str, Example]:
    # its own first steps are too small to be seen in a short run
    return {"mechanic": Example("mechanic(s_init=0.1)")}
