"""What wrappers see of one group: aligned lists of local tensors, of one device and dtype each."""

import sys
from typing import TYPE_CHECKING, Any

import torch

from metaopt.engine.lanes import ANEW, Lane
from metaopt.engine.scaling import apply_scale
from metaopt.engine.shards import all_local, dense, local, mean_over_shards, norm_over_shards
from metaopt.errors import StepError
from metaopt.wrapper import Group, Reduce, Wrapper

if TYPE_CHECKING:
    from metaopt.stack import Stack

Entry = dict[str, Any]
# rows of a tensor's first dimension, or None for all of them
Span = tuple[int, int] | None

# elements in a piece of tensors that a processor's cache holds together with their state
CPU_PIECE = 1 << 19
# an accelerator gets as much at once as costs little memory where a wrapper needs some of its own
DEVICE_PIECE = 1 << 25


def is_moment(value: Any, key: str, parameter: torch.Tensor) -> bool:
    """Tell whether an entry of the base's state is a moment: floating, not `step`, no lone number."""
    return (
        isinstance(value, torch.Tensor)
        and key != "step"
        and (value.is_floating_point() or value.is_complex())
        and (value.numel() > 1 or parameter.numel() <= 1)
    )


class Piece(Group):
    """One group's parameters of one device and dtype, or rows of them, for one wrapper, during one update."""

    def __init__(
        self,
        stack: "Stack",
        entry: Entry,
        wrapper: Wrapper,
        owners: list[torch.Tensor],
        spans: list[Span] | None = None,
        at: list[int] | None = None,
    ) -> None:
        self._stack = stack
        self._entry = entry
        self._wrapper = wrapper
        self._spans = spans
        self.owners = owners
        self.params = self._rows(all_local(owners))
        self.updates = entry["metaopt.updates"]
        self.index = list(range(len(owners))) if at is None else at

    def blocks(self) -> list["Piece"]:
        cpu = self.params[0].device.type == "cpu"
        if self._spans is None:
            return _cut(self, CPU_PIECE if cpu else DEVICE_PIECE)
        # a part already; where its tensors stand is told of this group, not of the one that it was cut from
        return [self.part(list(range(len(self.owners))), self._spans)]

    def part(self, at: list[int], spans: list[Span]) -> "Piece":
        """Return a piece of some of these parameters, or of rows of them."""
        owners = [self.owners[i] for i in at]
        return Piece(self._stack, self._entry, self._wrapper, owners, spans, at)

    def _rows(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        if self._spans is None:
            return tensors
        pairs = zip(tensors, self._spans, strict=True)
        return [tensor if span is None else tensor[span[0] : span[1]] for tensor, span in pairs]

    def __getattr__(self, name: str) -> Any:
        wrapper = self.__dict__["_wrapper"]
        key = f"{wrapper.label}.{name}"
        if name in wrapper.hyperparameters or name in wrapper.counters:
            return self._entry[key]
        slot = wrapper.slots.get(name)
        if slot is None:
            raise AttributeError(f"{wrapper.label} declares no hyperparameter and no state called {name!r}")
        if slot.kind == "moments":
            return {m: self._held(f"{key}.{m}") for m in self.base_moments}
        return self._rows(self._held(key))

    def _held(self, key: str) -> list[torch.Tensor]:
        stack = self._stack
        if stack.copies:
            return all_local([stack.held(p)[key] for p in self.owners])
        state = stack.base.state
        return all_local([state[p][key] for p in self.owners])

    @property
    def _lane(self) -> Lane:
        return self._stack.lane_of(self._entry)

    @property
    def grads(self) -> list[torch.Tensor]:
        apply_scale(self._stack, self._lane)
        if not self._wrapper.supports_sparse_grads and any(
            p.grad is not None and p.grad.is_sparse for p in self.owners
        ):
            raise StepError(f"{self._wrapper.label} needs dense gradients, and a parameter's is sparse: leave it out")
        gradients = self.raw_grads
        if len(gradients) < len(self.owners):
            raise StepError(
                f"{self._wrapper.label} reads gradients after the update, but {type(self._lane.base).__name__} "
                f"takes them away inside its step(): the two do not go together"
            )
        return gradients

    @property
    def raw_grads(self) -> list[torch.Tensor]:
        """The gradients as they stand in `p.grad`, whatever factor is pending."""
        return self._rows([dense(local(p.grad)) for p in self.owners if p.grad is not None])

    @property
    def base_lr(self) -> Any:
        if "lr" not in self._entry:
            raise StepError(f"{self._wrapper.label} needs a learning rate, {type(self._lane.base).__name__} has none")
        return self._entry["lr"]

    @property
    def maximize(self) -> bool:
        return bool(self._entry.get("maximize", False))

    @property
    def base_moments(self) -> dict[str, list[torch.Tensor]]:
        state, first = self._stack.state, self.owners[0]
        keys = [k for k in _base_keys(self._lane, state[first]) if is_moment(state[first][k], k, first)]
        return {key: [local(state[p][key]) for p in self.owners] for key in keys}

    def norms(self, tensors: list[torch.Tensor], *, rows: bool = False) -> list[torch.Tensor]:
        return [norm_over_shards(t, owner, rows=rows) for t, owner in zip(tensors, self.owners, strict=True)]

    def means(self, tensors: list[torch.Tensor], *, rows: bool = False) -> list[torch.Tensor]:
        return [mean_over_shards(t, owner, rows=rows) for t, owner in zip(tensors, self.owners, strict=True)]

    def replace_grads(self, gradients: list[torch.Tensor]) -> None:
        apply_scale(self._stack, self._lane)  # meant for the gradients that these take the place of
        for owner, lent in zip(self.owners, gradients, strict=True):
            owner.grad = _like(owner, lent)
            self._stack.borrowers.append(owner)

    def clear_grads(self) -> None:
        for owner in self.owners:
            owner.grad = None

    def set_params(self, tensors: list[torch.Tensor]) -> None:
        torch._foreach_copy_(self.params, tensors)
        state = self._stack.base.state
        for key in self._lane.seat(self._wrapper).nearer_anchors:
            if all(key in state[p] for p in self.owners):
                torch._foreach_copy_(self._rows(self._held(key)), self.params)
                continue
            # an anchor that has yet to be taken will be taken from where the parameter is then
            having = [i for i, p in enumerate(self.owners) if key in state[p]]
            spans = None if self._spans is None else [self._spans[i] for i in having]
            if having:
                some = Piece(self._stack, self._entry, self._wrapper, [self.owners[i] for i in having], spans)
                torch._foreach_copy_(some._rows(some._held(key)), some.params)

    def reset_base_state(self) -> None:
        self._stack.forget_base_state(self.owners, self._lane)

    @property
    def is_logged(self) -> bool:
        every = self._wrapper.every
        # called every k updates: the call before a point speaks for it
        return (
            self._stack.measuring
            if every is None
            else self._stack.point_within(int(self._entry[f"{self._wrapper.label}.{every}"]))
        )

    def measure(self, name: str, value: torch.Tensor | float, reduce: Reduce = "mean") -> None:
        self._stack.measure(f"{self._wrapper.label}/{name}", value, reduce)


def _like(owner: torch.Tensor, lent: torch.Tensor) -> torch.Tensor:
    """Return local values as a gradient of their owner: a DTensor where the owner is one, in its dtype."""
    gradient = lent if lent.dtype == owner.dtype else lent.to(owner.dtype)
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(owner, module.DTensor):
        return gradient
    wrapped: torch.Tensor = module.DTensor.from_local(
        gradient, owner.device_mesh, owner.placements, shape=owner.shape, stride=owner.stride()
    )
    return wrapped


def _base_keys(lane: Lane, held: dict[str, Any]) -> list[str]:
    """Return the keys of what the base keeps: nothing where its entries are fillings alone."""
    return [] if held.get(ANEW) else [key for key in held if lane.is_base_key(key)]


def pieces(stack: "Stack", entry: Entry, wrapper: Wrapper, owners: list[torch.Tensor]) -> list[Piece]:
    """Split parameters by device, dtype and the moments that the base keeps of them; none of the pieces is empty."""
    if not owners:
        return []
    lane = stack.lane_of(entry)
    kinds: list[Any] = [(owner.dtype, owner.device) for owner in owners]
    if lane.seat(wrapper).per_moment:
        moments = [tuple(_base_keys(lane, stack.base.state[owner])) for owner in owners]
        kinds = list(zip(kinds, moments, strict=True))
    if len(set(kinds)) == 1:
        return [Piece(stack, entry, wrapper, owners)]
    buckets: dict[Any, list[torch.Tensor]] = {}
    for kind, owner in zip(kinds, owners, strict=True):
        buckets.setdefault(kind, []).append(owner)
    return [Piece(stack, entry, wrapper, bucket) for bucket in buckets.values()]


def small_pieces(stack: "Stack", entry: Entry, wrapper: Wrapper, owners: list[torch.Tensor]) -> list[Piece]:
    """Split parameters as `pieces` does and then into parts that stay in a cache, or cost little memory.

    For wrappers that treat every element alike and read it more than once; an accelerator gets all at once: one launch
    for everything.
    """
    found = pieces(stack, entry, wrapper, owners)
    if stack.lane_of(entry).seat(wrapper).per_moment:
        return found
    return [part for piece in found for part in (piece.blocks() if piece.params[0].device.type == "cpu" else [piece])]


def _cut(piece: Piece, most: int) -> list[Piece]:
    """Cut a piece into some of at most so many elements each, between tensors and between rows."""
    if sum(p.numel() for p in piece.params) <= most:
        return [piece]
    cut: list[tuple[list[int], list[Span]]] = []
    filled = 0
    for i, tensor in enumerate(piece.params):
        for span, size in _spans(tensor, most):
            if not cut or filled + size > most:
                cut.append(([], []))
                filled = 0
            cut[-1][0].append(i)
            cut[-1][1].append(span)
            filled += size
    return [piece.part(at, spans) for at, spans in cut]


def _spans(tensor: torch.Tensor, most: int) -> list[tuple[Span, int]]:
    size = tensor.numel()
    if size <= most or tensor.dim() == 0:
        return [(None, size)]
    length = tensor.shape[0]
    row = size // length
    rows = max(1, most // row)
    cuts = [(begin, min(begin + rows, length)) for begin in range(0, length, rows)]
    return [((begin, end), row * (end - begin)) for begin, end in cuts]
