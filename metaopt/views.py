"""What wrappers see of a stack: its groups as aligned lists of local tensors, of one device and dtype each."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from metaopt.errors import HyperparameterError
from metaopt.wrapper import Gradients, Group, Wrapper

if TYPE_CHECKING:
    from metaopt.stack import Stack

# gradients wider than this are not folded into a fused kernel: its factor is float32
WIDEST_FOLDED = 4


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process holds: a DTensor's shard, any other tensor itself."""
    # a DTensor can only exist once its module was imported; importing it here would cost everyone half a second
    module = sys.modules.get("torch.distributed.tensor")
    return tensor.to_local() if module is not None and isinstance(tensor, module.DTensor) else tensor


def dense(gradient: torch.Tensor) -> torch.Tensor:
    """Return the values of a gradient: a coalesced sparse one's stored values, a dense one itself."""
    return gradient._values() if gradient.is_sparse else gradient


def is_moment(value: Any, key: str, parameter: torch.Tensor) -> bool:
    """Tell whether an entry of the base's state is a moment: floating, not `step`, no lone number."""
    return (
        isinstance(value, torch.Tensor)
        and key != "step"
        and (value.is_floating_point() or value.is_complex())
        and (value.numel() > 1 or parameter.numel() <= 1)
    )


class Piece(Group):
    """One group's parameters of one device and dtype, for one wrapper, during one update."""

    def __init__(self, stack: "Stack", position: int, wrapper: Wrapper, owners: list[torch.Tensor]) -> None:
        self._stack = stack
        self._position = position
        self._entry = stack.param_groups[position]
        self._wrapper = wrapper
        self.owners = owners
        self.params = [local(owner) for owner in owners]
        self.updates = self._entry["metaopt.updates"]

    def __getattr__(self, name: str) -> Any:
        wrapper = self.__dict__["_wrapper"]
        key = f"{wrapper.label}.{name}"
        if name in wrapper.hyperparameters:
            return self._entry[key]
        slot = wrapper.slots.get(name)
        if slot is None:
            raise AttributeError(f"{wrapper.label} declares no hyperparameter and no state called {name!r}")
        state = self._stack.state
        if slot.kind == "moments":
            return {m: [local(state[p][f"{key}.{m}"]) for p in self.owners] for m in self.base_moments}
        return [local(state[p][key]) for p in self.owners]

    @property
    def grads(self) -> list[torch.Tensor]:
        self._stack.apply_scale()
        return self.raw_grads

    @property
    def raw_grads(self) -> list[torch.Tensor]:
        return [dense(local(p.grad)) for p in self.owners if p.grad is not None]

    @property
    def base_moments(self) -> dict[str, list[torch.Tensor]]:
        state, first = self._stack.state, self.owners[0]
        keys = [k for k, v in state[first].items() if self._stack.is_base_key(k) and is_moment(v, k, first)]
        return {key: [local(state[p][key]) for p in self.owners] for key in keys}

    def move_to(self, tensors: list[torch.Tensor]) -> None:
        torch._foreach_copy_(self.params, tensors)
        for key in self._stack.anchors_nearer_than(self._wrapper):
            followers = [
                (self._stack.state[p].get(key), moved) for p, moved in zip(self.owners, self.params, strict=True)
            ]
            kept = [(local(follower), moved) for follower, moved in followers if follower is not None]
            if kept:
                torch._foreach_copy_([follower for follower, _ in kept], [moved for _, moved in kept])

    def reset_base(self) -> None:
        self._stack.forget_base_state(self.owners)

    @property
    def measured(self) -> bool:
        every = self._wrapper.every
        # called every k updates: the call before a point speaks for it
        return (
            self._stack.measuring
            if every is None
            else self._stack.point_within(int(self._entry[f"{self._wrapper.label}.{every}"]))
        )

    def measure(self, name: str, value: torch.Tensor | float) -> None:
        self._stack.measure(f"{self._wrapper.label}/{name}", value)


def pieces(stack: "Stack", position: int, wrapper: Wrapper, owners: list[torch.Tensor]) -> list[Piece]:
    """Split parameters by device, dtype and the moments that the base keeps of them; none of the pieces is empty."""
    buckets: dict[Any, list[torch.Tensor]] = {}
    by_moments = any(slot.kind == "moments" for slot in wrapper.state_slots().values())
    for owner in owners:
        shape = tuple(k for k in stack.state[owner] if stack.is_base_key(k)) if by_moments else ()
        buckets.setdefault((owner.device, owner.dtype, shape), []).append(owner)
    return [Piece(stack, position, wrapper, bucket) for bucket in buckets.values()]


def gradient_norm(stack: "Stack", norm_type: float = 2.0) -> torch.Tensor:
    """Return the norm over all gradients, reduced over groups, devices and shards; a pending factor counts."""
    gradients = [
        # a sparse gradient counts each stored value once: duplicates are summed first
        dense(p.grad) if p.grad.is_sparse else p.grad
        for entry in stack.param_groups
        for p in entry["params"]
        if p.grad is not None
    ]
    total = torch.nn.utils.get_total_norm(gradients, norm_type)
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None and isinstance(total, module.DTensor):
        total = total.full_tensor()
    pending = stack.pending_scale
    return total if pending is None else total * pending.abs().to(total.device)


class AllGradients(Gradients):
    """The gradients of all groups at one evaluation of the loss; a lazy factor waits in the stack."""

    def __init__(self, stack: "Stack", wrapper: Wrapper) -> None:
        self._stack = stack
        self._wrapper = wrapper

    def __iter__(self) -> Iterator[Piece]:
        for position, entry in enumerate(self._stack.param_groups):
            owners = [p for p in entry["params"] if p.grad is not None]
            yield from pieces(self._stack, position, self._wrapper, owners)

    def norm(self, norm_type: float = 2.0) -> torch.Tensor:
        return gradient_norm(self._stack, norm_type)

    def scale(self, factor: torch.Tensor) -> None:
        pending = self._stack.pending_scale
        self._stack.pending_scale = factor if pending is None else pending * factor

    @property
    def measured(self) -> bool:
        return self._stack.measuring

    def measure(self, name: str, value: torch.Tensor | float) -> None:
        self._stack.measure(f"{self._wrapper.label}/{name}", value)

    def __getattr__(self, name: str) -> Any:
        wrapper = self.__dict__["_wrapper"]
        if name in wrapper.hyperparameters:
            key = f"{wrapper.label}.{name}"
            first, *others = (entry[key] for entry in self._stack.param_groups)
            if any(other is not first and other != first for other in others):
                raise HyperparameterError(
                    f"{key} differs between groups, but {wrapper.label} acts on all gradients at once: "
                    f"give every group the same value"
                )
            return first
        raise AttributeError(f"{wrapper.label} declares no hyperparameter called {name!r}")
