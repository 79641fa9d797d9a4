"""torch's fused updates, called directly: the lists that torch.optim gathers anew in every step are kept.

Only for torch's own Adam, AdamW and SGD on a processor, from the second update of a parameter on. Everything else, and
whatever has changed since the update before, goes through the base's own `step()`.
"""

from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch

from metaopt.engine.chain import PLACEHOLDER, Chain, ParamGroup, ParamState
from metaopt.engine.shards import PLAIN

# what a base keeps for each parameter, in the order of the kernel's arguments
KEPT: dict[type, tuple[str, ...]] = {
    torch.optim.Adam: ("exp_avg", "exp_avg_sq", "step"),
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq", "step"),
    torch.optim.SGD: ("momentum_buffer",),
}
# settings under which torch does more than call the kernel
CAREFUL = ("amsgrad", "capturable", "differentiable")

Tensors = list[torch.Tensor]


class FusedLists:
    """What a fused kernel takes of one group, as lists; valid while groups and state hold the same tensors."""

    def __init__(self, keys: tuple[str, ...], members: Tensors, states: list[ParamState]) -> None:
        self._keys = keys
        self._members = list(members)
        self._states = states
        self._kept: list[Tensors] = [list(map(itemgetter(key), states)) for key in keys]

    def are_valid(self, chain: Chain, group: ParamGroup, members: Tensors) -> bool:
        """Return whether a group with these members has the state that the lists hold."""
        return (
            _keys(chain, group) == self._keys
            and _same(members, self._members)
            and _same(list(map(chain.base.state.get, members)) if self._keys else [], self._states)
            and all(_same([s.get(key) for s in self._states], kept) for key, kept in zip(self._keys, self._kept, strict=True))
        )

    def are_uniform(self, dtype: torch.dtype) -> bool:
        """Return whether the state can be handed to the kernel as it is; torch would sort it by dtype and device."""
        return all(
            is_uniform(kept, torch.float32 if key == "step" else dtype)
            for key, kept in zip(self._keys, self._kept, strict=True)
        )

    def step(
        self,
        group: ParamGroup,
        params: Tensors,
        gradients: Tensors,
        scale: torch.Tensor | None,
        part: slice = slice(None),
    ) -> None:
        """Update `params` and the state: the members in `part`, or copies of them that are to be moved instead."""
        kernel = _adam if "step" in self._keys else _sgd
        kernel(group, params, gradients, [kept[part] for kept in self._kept], scale)


def lists_for(
    known: dict[int, FusedLists], chain: Chain, group: ParamGroup, members: Tensors, gradients: Tensors
) -> FusedLists | None:
    """Return the lists for an update of a group; None: the base has to step itself, at least this time."""
    if not (chain.is_direct and members) or not group.get("fused") or any(map(group.get, CAREFUL)) or "found_inf" in vars(chain.base):
        return None
    if any(isinstance(number, torch.Tensor) for number in (group["lr"], *group.get("betas", ()))):
        return None
    dtype = members[0].dtype
    if not (is_uniform(members, dtype) and is_uniform(gradients, dtype) and dtype.is_floating_point):
        return None
    lists = known.get(id(group))
    if lists is None or not lists.are_valid(chain, group, members):
        known.pop(id(group), None)
        lists = _gathered(chain, group, members)
        if lists is None or not lists.are_uniform(dtype):
            return None
        known[id(group)] = lists
    return lists


def is_uniform(tensors: Tensors, dtype: torch.dtype) -> bool:
    """Return whether all are ordinary dense tensors of one dtype, on the processor."""
    return (
        PLAIN.issuperset(map(type, tensors))
        and all(map(is_, map(attrgetter("dtype"), tensors), repeat(dtype)))
        and all(map(is_, map(attrgetter("layout"), tensors), repeat(torch.strided)))
        and all(map(attrgetter("is_cpu"), tensors))
    )


def _gathered(chain: Chain, group: ParamGroup, members: Tensors) -> FusedLists | None:
    keys = _keys(chain, group)
    states = [chain.base.state.get(p) or {} for p in members] if keys else []
    if any(state.get(PLACEHOLDER) or any(state.get(key) is None for key in keys) for state in states):
        return None
    return FusedLists(keys, members, states)


def _keys(chain: Chain, group: ParamGroup) -> tuple[str, ...]:
    # SGD keeps nothing without momentum
    return KEPT[type(chain.base)] if group.get("momentum", True) else ()


def _same(found: Sequence[Any], kept: Sequence[Any]) -> bool:
    return len(found) == len(kept) and all(map(is_, found, kept))


def _adam(group: ParamGroup, params: Tensors, gradients: Tensors, kept: list[Tensors], scale: Any) -> None:
    averages, squares, steps = kept
    kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    beta1, beta2 = group["betas"]
    torch._foreach_add_(steps, 1)
    kernel(
        params,
        gradients,
        averages,
        squares,
        [],
        steps,
        amsgrad=False,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
        grad_scale=scale,
        found_inf=None,
    )


def _sgd(group: ParamGroup, params: Tensors, gradients: Tensors, kept: list[Tensors], scale: Any) -> None:
    torch._fused_sgd_(
        params,
        gradients,
        kept[0] if kept else [],
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        is_first_step=False,
        grad_scale=scale,
        found_inf=None,
    )
