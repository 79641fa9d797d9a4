"""Lookahead with a real outer optimizer: Nesterov momentum on the way that k updates went."""

import torch

from metaopt import Group, Wrapper, anchor, hookimpl, hyper, zeros


class Outer(Wrapper, every="k", each="element"):
    """s = slow - fast; b <- momentum b + s; slow <- slow - lr (momentum b + s); fast <- slow, every k updates.

    Without `nesterov` the step is lr b. With momentum=0 it is Lookahead with alpha=lr (arXiv:1907.08610); with Nesterov
    momentum it is SNOO (arXiv:2510.15830), the outer step of DiLoCo (arXiv:2311.08105) on one worker.
    """

    known_as = ("SNOO", "DiLoCo", "BlockMomentum", "slow momentum")

    k: int = hyper(28, min=1, doc="updates between outer steps", known_as=("sync_period",))
    lr: float = hyper(0.7, above=0.0, doc="the outer rate; above 1 is allowed", known_as=("outer_lr", "alpha"))
    momentum: float = hyper(0.6, min=0.0, below=1.0, doc="the outer momentum", known_as=("outer_momentum", "mu"))
    nesterov: bool = hyper(True, doc="step along momentum b + s rather than along b")
    slow_dtype: str | None = hyper(
        None,
        choices=(None, "float32"),
        doc="the dtype of the slow weights and the outer momentum; None: the parameter's own",
        structural=True,
    )
    slow = anchor(dtype="slow_dtype")
    buffer = zeros(dtype="slow_dtype")

    def after_update(self, group: Group) -> None:
        way = torch._foreach_sub(group.slow, group.params)
        torch._foreach_mul_(group.buffer, group.momentum)
        torch._foreach_add_(group.buffer, way)
        if group.nesterov:
            torch._foreach_add_(way, torch._foreach_mul(group.buffer, group.momentum))
        else:
            way = group.buffer
        torch._foreach_sub_(group.slow, torch._foreach_mul(way, group.lr))
        group.move_to(group.slow)

    def averaged(self, group: Group) -> list[torch.Tensor]:
        slow: list[torch.Tensor] = group.slow
        return slow


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"outer": Outer}
