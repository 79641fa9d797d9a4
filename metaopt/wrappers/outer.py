"""Lookahead with a real outer optimizer: Nesterov momentum on the way that k updates went."""

import torch

from metaopt import Example, Group, Wrapper, anchor, hookimpl, hyper, zeros


class Outer(Wrapper, every="k", elementwise=True, across="slow"):
    """s = slow - fast; b <- momentum b + s; slow <- slow - lr (momentum b + s); fast <- slow, every k updates.

    Without `nesterov` the step is lr b. With momentum=0 it is Lookahead with alpha=lr (arXiv:1907.08610); with Nesterov
    momentum it is SNOO (arXiv:2510.15830), the outer step of DiLoCo (arXiv:2311.08105) on one worker. With
    across="replicas" it is DiLoCo: s is averaged over all replicas. With `fragments` and `delay` it is Streaming DiLoCo
    (arXiv:2501.18512): fast <- blend fast + (1 - blend) slow, `delay` updates after s was sent.
    """

    known_as = ("SNOO", "DiLoCo", "BlockMomentum", "slow momentum")

    k: int = hyper(28, ge=1, doc="updates between outer steps", known_as=("sync_period",))
    lr: float = hyper(0.7, gt=0.0, doc="the outer rate; above 1 is allowed", known_as=("outer_lr", "alpha"))
    momentum: float = hyper(0.6, ge=0.0, lt=1.0, doc="the outer momentum", known_as=("outer_momentum", "mu"))
    nesterov: bool = hyper(True, doc="step along momentum b + s rather than along b")
    slow_dtype: str | None = hyper(
        None,
        choices=(None, "float32"),
        doc="the dtype of the slow weights and the outer momentum; None: the parameter's own",
        defines_state=True,
    )
    device: str | None = hyper(
        None,
        choices=(None, "cpu"),
        doc="where slow weights and outer momentum are kept: 'cpu' is main memory; None: beside the parameter",
        known_as=("offload", "offload_to_cpu"),
        defines_state=True,
    )
    slow = anchor(dtype="slow_dtype", device="device")
    buffer = zeros(dtype="slow_dtype", device="device")

    def after_update(self, group: Group) -> None:
        fast, slow, buffer = group.params, group.slow, group.buffer
        if group.across is not None:
            _advance(slow, buffer, group.mean_way, group)
        elif all(f.dtype == s.dtype for f, s in zip(fast, slow, strict=True)):
            # the fast weights are about to be overwritten, so the way back to them needs no memory of its own
            torch._foreach_sub_(fast, slow)
            _advance(slow, buffer, fast, group)
        else:
            _advance(slow, buffer, list(torch._foreach_sub(group.cast(fast, slow[0].dtype), slow)), group)
        group.set_params(slow)

    def averaged(self, group: Group) -> list[torch.Tensor]:
        slow: list[torch.Tensor] = group.slow
        return slow


def _advance(
    slow: list[torch.Tensor], buffer: list[torch.Tensor], difference: list[torch.Tensor], group: Group
) -> None:
    """Make the outer step, `difference` being fast - slow."""
    torch._foreach_mul_(buffer, group.momentum)
    torch._foreach_sub_(buffer, difference)
    if group.nesterov:
        torch._foreach_add_(slow, difference, alpha=group.lr)
    torch._foreach_add_(slow, buffer, alpha=-group.lr * (group.momentum if group.nesterov else 1.0))


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"outer": Outer}


@hookimpl
def metaopt_examples() -> dict[str, list[Example]]:
    streaming = "outer(k=4, across='replicas', fragments=2, delay=1, blend=0.25)"
    return {"outer": [Example("outer(k=2)"), Example("outer(k=2, across='replicas')"), Example(streaming)]}
