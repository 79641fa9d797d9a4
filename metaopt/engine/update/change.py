"""What one update adds to the weights (`group.update`), and the weights from before: tensors of this process.

Copies are made in memory that is used again from block to block on a processor, and in flat memory on an accelerator.
"""

from collections.abc import Iterator
from operator import attrgetter

import torch

from metaopt.distributed.shards import local
from metaopt.flat_memory import flat_room, flat_rooms, memory_of
from metaopt.multi_tensor import add_, at_least_float32, cast, copies, on_accelerator

Params = list[torch.Tensor]


class Change:
    """The weights from before an update, by parameter, and what is added to them."""

    __slots__ = (
        "_applied_versions",
        "_block_memory",
        "_kept_for_observers",
        "_room_of",
        "added",
        "unapplied",
        "weights_before",
        "whole",
    )

    def __init__(self) -> None:
        self.weights_before: dict[torch.Tensor, torch.Tensor] = {}
        self.added: dict[torch.Tensor, torch.Tensor] = {}
        # parameters that hold the weights from before now: their change is yet to be added
        self.unapplied: set[torch.Tensor] = set()
        # of the others: versions of change and weights when the weights were last set to their sum
        self._applied_versions: dict[torch.Tensor, tuple[int, int]] = {}
        # memory for the change of a block, and by role and dtype what such memory is cut from
        self._room_of: dict[torch.Tensor, torch.Tensor] = {}
        self._block_memory: dict[object, torch.Tensor] = {}
        # for parts that only look: the weights before, which become the whole change behind all others; None until then
        self._kept_for_observers: dict[torch.Tensor, torch.Tensor] = {}
        self.whole: dict[torch.Tensor, torch.Tensor] | None = None

    def keep(self, params: Params) -> None:
        """Copy the weights of some parameters, right before the base moves them."""
        self.weights_before.update(_copied(params))

    def keep_for_observers(self, params: Params) -> None:
        """Copy the weights of parameters that are updated, for parts that only look."""
        self._kept_for_observers.update(_copied(params))

    def begin_observing(self) -> None:
        """Let parts that only look see all that was added to the weights; the copies of these are overwritten."""
        self.whole = {}
        for part in _taken_together(list(self._kept_for_observers)):
            if not on_accelerator(part):
                for p in part:
                    before, weights = self._kept_for_observers.pop(p), local(p)
                    wide = at_least_float32(weights.dtype)
                    out = before if wide == weights.dtype else torch.empty_like(weights, dtype=wide)
                    self.whole[p] = torch.sub(weights.to(wide), before, out=out)
                continue
            befores, weights_now = [self._kept_for_observers.pop(p) for p in part], [local(p) for p in part]
            self.whole.update(zip(part, _differences(weights_now, befores), strict=True))

    def keep_block(self, params: Params) -> None:
        """Copy the weights of a block of parameters into memory that the next block uses again.

        Fresh memory would cost a processor more time than the arithmetic: the system clears every page of it.
        """
        for part in _by_dtype_and_device(params):
            weights = [local(p) for p in part]
            before, change = self._room_for_block(weights)
            torch._foreach_copy_(before, weights)
            self.weights_before.update(zip(part, before, strict=True))
            self._room_of.update(zip(part, change, strict=True))

    def copies_to_move(self, params: Params) -> list[torch.Tensor]:
        """Return copies of the weights of a block, which the base is to move in their place."""
        copies = self._cut_memory("change", params)
        torch._foreach_copy_(copies, params)
        return copies

    def take_copies(self, params: Params, copies: list[torch.Tensor]) -> None:
        """Take what the base has added to copies of the weights as the change; the weights themselves stand still."""
        torch._foreach_sub_(copies, params)
        self.weights_before.update(zip(params, params, strict=True))
        self.added.update(zip(params, copies, strict=True))
        self.unapplied.update(params)

    def _room_for_block(self, weights: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        """Return room for the weights before and for their change."""
        if on_accelerator(weights) and weights[0].dtype == at_least_float32(weights[0].dtype):
            return flat_rooms(weights, weights[0].dtype, 2)
        return [self._cut_memory(role, weights) for role in ("before", "change")]

    def _cut_memory(self, role: str, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return tensors of the weights' shapes in memory of this update; those of a change are at least float32."""
        dtype = weights[0].dtype if role == "before" else at_least_float32(weights[0].dtype)
        if on_accelerator(weights):
            return flat_room(weights, dtype)
        key, sizes = (role, weights[0].dtype, weights[0].device), [w.numel() for w in weights]
        memory = self._block_memory.get(key)
        if memory is None or memory.numel() < sum(sizes):
            memory = self._block_memory[key] = torch.empty(sum(sizes), dtype=dtype, device=weights[0].device)
        pieces = torch.split(memory[: sum(sizes)], sizes)
        return [piece.view(w.shape) for piece, w in zip(pieces, weights, strict=True)]

    def of(self, p: torch.Tensor) -> torch.Tensor:
        """Return what was added to a parameter so far, at least float32; what is written to it is applied later."""
        if p in self.unapplied:
            return self.added[p]
        if self._has_moved_since(p):
            weights, before, memory = local(p), self.weights_before[p], self._room_of.pop(p, None)
            wide = at_least_float32(weights.dtype)
            if memory is None:
                memory = torch.empty_like(weights, dtype=wide)
            change = self.added[p] = torch.sub(weights.to(wide), before, out=memory)
            self._applied_versions[p] = change._version, weights._version
        return self.added[p]

    def read_only_weights(self, params: Params) -> list[torch.Tensor]:
        """Return the weights of parameters, or their copies from before the update if these are in flat memory."""
        if all(p in self.unapplied for p in params):
            before = [self.weights_before[p] for p in params]
            if memory_of(before) is not None:
                return before
        return [local(p) for p in params]

    def _has_moved_since(self, p: torch.Tensor) -> bool:
        """Return whether a parameter has moved since its change was last worked out, if ever."""
        return p not in self.added or self._applied_versions.get(p, (0, -1))[1] != local(p)._version

    def of_all(self, params: Params) -> list[torch.Tensor]:
        """Return `of` each of some parameters of one device and dtype."""
        if on_accelerator(params):
            new = [p for p in params if p not in self.unapplied and self._has_moved_since(p)]
            if new:
                weights, befores = [local(p) for p in new], [self.weights_before[p] for p in new]
                memory = [self._room_of.pop(p, None) for p in new]
                out = [m for m in memory if m is not None]
                changes = _differences(weights, befores, out if len(out) == len(new) else None)
                self.added.update(zip(new, changes, strict=True))
                for p, change, now in zip(new, changes, weights, strict=True):
                    self._applied_versions[p] = change._version, now._version
        return [self.of(p) for p in params]

    def return_to_weights_before(self, params: Params) -> None:
        """Give the parameters their weights from before the update; `added` holds what is to come."""
        for part in _taken_together([p for p in params if p not in self.unapplied]):
            if on_accelerator(part):
                self.of_all(part)
                torch._foreach_copy_([local(p) for p in part], [self.weights_before[p] for p in part])
            else:
                for p in part:
                    self.of(p)
                    local(p).copy_(self.weights_before[p])
            self.unapplied.update(part)

    def apply(self, params: Params) -> None:
        """Set the parameters to the weights before plus the change, rounded once."""
        for part in _taken_together(params):
            add_([local(p) for p in part], [self.added[p] for p in part])
        for p in params:
            weights, change = local(p), self.added[p]
            self.unapplied.discard(p)
            self._applied_versions[p] = change._version, weights._version

    def apply_written(self, params: Params) -> Params:
        """Set those parameters to the weights before plus the change whose change a wrapper has written to."""
        written = [p for p in params if p in self.added and self.added[p]._version != self._applied_versions[p][0]]
        for part in _taken_together(written):
            torch._foreach_copy_([local(p) for p in part], [self.weights_before[p] for p in part])
        self.apply(written)
        return written

    def forget(self, params: Params) -> None:
        """Forget the weights before and the change of some parameters."""
        for p in params:
            self.weights_before.pop(p, None)
            self._room_of.pop(p, None)
            self.added.pop(p, None)
            self._applied_versions.pop(p, None)


def _copied(params: Params) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield parameters with copies of what this process holds of them."""
    for part in _taken_together(params):
        yield from zip(part, copies([local(p) for p in part]), strict=True)


def _differences(
    weights: list[torch.Tensor], befores: list[torch.Tensor], out: list[torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """Return how far weights have moved, in float32 at least, by calls over all of them."""
    out = flat_room(weights, at_least_float32(weights[0].dtype)) if out is None else out
    torch._foreach_copy_(out, weights)
    torch._foreach_sub_(out, cast(befores))
    return out


def _taken_together(params: Params) -> list[Params]:
    """Return the lists that multi-tensor calls take: all on a processor, where dtypes may be mixed at no cost."""
    if all(map(attrgetter("is_cpu"), params)):
        return [params] if params else []
    return _by_dtype_and_device(params)


def _by_dtype_and_device(params: Params) -> list[Params]:
    """Return the parameters in lists of one dtype and device each."""
    lists: dict[tuple[torch.dtype, torch.device], Params] = {}
    for p in params:
        lists.setdefault((p.dtype, p.device), []).append(p)
    return list(lists.values())
