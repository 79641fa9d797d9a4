"""Lookahead: slow weights that the fast ones are pulled back to every `k` updates."""

from typing import Literal

import torch
from torch import Tensor

from metaopt import Example, Group, Wrapper, anchor, elementwise, hookimpl, hyper, moments


class Lookahead(Wrapper, every="k", elementwise=True, across="slow"):
    """slow <- slow + alpha (fast - slow); fast <- slow, every k updates. arXiv:1907.08610

    `pullback_momentum` treats the base's moments at a pull: "reset" drops the base's state, which then starts lazily
    (bias correction included); "pullback" interpolates each moment with its value at the last pull,
    m <- alpha m + (1 - alpha) c; c <- m, with c = 0 at first. The paper maintains, resets or interpolates them.
    With across="replicas" the way fast - slow is averaged over all replicas: with alpha=1 that is local SGD
    (arXiv:1805.09767). `fragments`, `delay` and `blend` are those of `outer`.
    """

    measures = {"distance": "how far the fast weights are from the slow ones right before a pull"}

    k: int = hyper(5, ge=1, doc="updates between pulls", known_as=("sync_period", "la_steps", "lookahead_k"))
    alpha: float = hyper(
        0.5,
        gt=0.0,
        doc="how far the slow weights move toward the fast ones",
        known_as=("slow_step_size", "la_alpha", "lookahead_alpha"),
    )
    pullback_momentum: Literal["none", "reset", "pullback"] = hyper(
        "none",
        choices=("none", "reset", "pullback"),
        doc="what a pull does to the base's moments",
        defines_state=True,
    )
    slow_dtype: str | None = hyper(
        None,
        choices=(None, "float32"),
        doc="the dtype of the slow weights; None: the parameter's own",
        defines_state=True,
    )
    device: str | None = hyper(
        None,
        choices=(None, "cpu"),
        doc="where the slow weights are kept: 'cpu' is main memory; None: beside the parameter",
        known_as=("offload", "offload_to_cpu"),
        defines_state=True,
    )
    slow = anchor(dtype="slow_dtype", device="device")
    cached = moments()

    def active_slots(self) -> dict:  # type: ignore[type-arg]
        pulls_back = self.pullback_momentum == "pullback"
        return {name: slot for name, slot in super().active_slots().items() if pulls_back or name != "cached"}

    def resets_base_state(self) -> bool:
        return self.pullback_momentum == "reset"

    @elementwise
    @staticmethod
    def pull(param: Tensor, slow: Tensor, *, alpha: float) -> dict[str, Tensor]:
        slow = torch.lerp(slow, param, alpha)
        return {"slow": slow, "param": slow}

    def after_update(self, group: Group) -> None:
        if group.is_logged:
            group.measure("distance", _distance(group), reduce="norm")
        if group.across is None:
            self.pull(group)
        else:
            slow = group.slow
            torch._foreach_add_(slow, group.mean_way, alpha=group.alpha)
            group.set_params(slow)
        if self.pullback_momentum == "reset":
            group.reset_base_state()
        elif self.pullback_momentum == "pullback":
            for key, held in group.cached.items():
                current = group.base_moments[key]
                torch._foreach_lerp_(current, held, 1.0 - group.alpha)
                torch._foreach_copy_(held, current)

    def averaged(self, group: Group) -> list[torch.Tensor]:
        slow: list[torch.Tensor] = group.slow
        return slow


def _distance(group: Group) -> torch.Tensor:
    differences = torch._foreach_sub(group.cast(group.params, group.slow[0].dtype), group.slow)
    distance: torch.Tensor = torch.linalg.vector_norm(group.stack(list(torch._foreach_norm(differences))))
    return distance


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"lookahead": Lookahead}


@hookimpl
def metaopt_examples() -> dict[str, list[Example]]:
    ways = ("reset", "pullback")
    return {
        "lookahead": [
            Example("lookahead(k=2)"),
            *(Example(f"lookahead(k=2, pullback_momentum={way!r})") for way in ways),
            Example("lookahead(k=2, slow_dtype='float32', device='cpu')"),
            Example("lookahead(k=2, alpha=1.0, across='replicas')"),
        ]
    }
