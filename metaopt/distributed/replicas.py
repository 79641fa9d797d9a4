"""Replicas: processes that train copies of one model, and what they take from one another through a process group."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from metaopt.errors import SpecError, StepError

# bytes that one collective moves at most: few calls, and little memory beside the weights
BUCKET = 1 << 25


class Replicas:
    """The process group over which means are taken: a given one, or the default one if there is any.

    A copy of a stack uses the same group. A group cannot be pickled: a stack that was pickled with one of its own
    refuses to take means.
    """

    def __init__(self, group: Any = None) -> None:
        self._is_lost = False
        self._given = _as_group(group)

    @property
    def group(self) -> Any:
        """The process group, or None if this process is the only one."""
        if self._is_lost:
            raise StepError(
                "the process group that build(..., replicas=) was given was not pickled with the stack: build the "
                "stack again and load its state_dict() instead"
            )
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return None
        return distributed.group.WORLD if self._given is None else self._given

    @property
    def size(self) -> int:
        """How many replicas there are."""
        group = self.group
        return 1 if group is None else torch.distributed.get_world_size(group)

    @property
    def rank(self) -> int:
        """The number of this replica in the group."""
        group = self.group
        return 0 if group is None else torch.distributed.get_rank(group)

    def ranks(self) -> list[int]:
        """Return the ranks of all replicas in the default group."""
        group = self.group
        return [0] if group is None else torch.distributed.get_process_group_ranks(group)

    # ---- collectives

    def begin_sum(self, flat: torch.Tensor) -> "Sum":
        """Begin to add a flat tensor up over all replicas, in place."""
        if self.size == 1:
            return Sum(flat, None, 1)
        # collectives know no complex numbers
        numbers = torch.view_as_real(flat) if flat.is_complex() else flat
        return Sum(flat, torch.distributed.all_reduce(numbers, group=self.group, async_op=True), self.size)

    def mean(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the mean of each tensor over the replicas, with one all-reduce for each bucket; alone, the tensors."""
        if self.size == 1:
            return list(tensors)
        means: dict[int, torch.Tensor] = {}
        for bucket in _buckets(tensors):
            total = self.begin_sum(torch.cat([tensors[i].detach().reshape(-1) for i in bucket])).mean()
            pieces = torch.split(total, [tensors[i].numel() for i in bucket])
            means.update({i: piece.view(tensors[i].shape) for i, piece in zip(bucket, pieces, strict=True)})
        return [means[i] for i in range(len(tensors))]

    def broadcast(self, tensors: Sequence[torch.Tensor], source: int) -> None:
        """Set tensors to those of one replica, in place."""
        for bucket in _buckets(tensors):
            flat = torch.cat([tensors[i].detach().reshape(-1) for i in bucket])
            numbers = torch.view_as_real(flat) if flat.is_complex() else flat
            torch.distributed.broadcast(numbers, group=self.group, group_src=source)
            if self.rank != source:
                for i, piece in zip(bucket, torch.split(flat, [tensors[i].numel() for i in bucket]), strict=True):
                    tensors[i].copy_(piece.view(tensors[i].shape))

    def gather(self, numbers: Sequence[int], device: torch.device) -> list[list[int]]:
        """Return what each replica gives."""
        own = torch.tensor(numbers, dtype=torch.int64, device=device)
        told = [torch.empty_like(own) for _ in range(self.size)]
        torch.distributed.all_gather(told, own, group=self.group)
        found: list[list[int]] = torch.stack(told).tolist()
        return found

    # ---- copies

    def __deepcopy__(self, memo: dict[int, Any]) -> "Replicas":
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"_given": None, "_is_lost": self._is_lost or self._given is not None}


class Sum:
    """A flat tensor that is being added up over the replicas."""

    def __init__(self, flat: torch.Tensor, work: Any, size: int) -> None:
        self.flat = flat
        self._work = work
        self._size = size

    def mean(self) -> torch.Tensor:
        """Wait for the sum and return it divided by the number of replicas; may be called again."""
        if self._work is not None:
            self._work.wait()
            self._work = None
            self.flat.div_(self._size)
        return self.flat


def _as_group(given: Any) -> Any:
    """Return the process group that a user names: a group, or a device mesh of one dimension."""
    if given is None:
        return None
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        raise SpecError("replicas= needs torch.distributed.init_process_group() first")
    if hasattr(given, "get_group") and hasattr(given, "ndim"):
        if given.ndim != 1:
            raise SpecError(f"replicas= must be a device mesh of one dimension, got {given.ndim}: mesh['name']")
        given = given.get_group()
    if given is not distributed.GroupMember.NON_GROUP_MEMBER and not isinstance(given, distributed.ProcessGroup):
        raise SpecError(
            f"replicas= must be a process group, a device mesh of one dimension or None, got {type(given).__name__}"
        )
    if not isinstance(given, distributed.ProcessGroup) or distributed.get_rank(given) < 0:
        raise SpecError(
            f"replicas=: rank {distributed.get_rank()} is not in this group: give each rank the group that it is in"
        )
    return given


def _buckets(tensors: Iterable[torch.Tensor]) -> list[list[int]]:
    return in_buckets(((tensor.dtype, tensor.device), tensor.nbytes) for tensor in tensors)


def in_buckets(members: Iterable[tuple[Any, int]]) -> list[list[int]]:
    """Return the positions of members of one kind, of so many bytes together; a larger one is alone.

    A member is a kind, such as dtype and device, and a number of bytes.
    """
    found: list[list[int]] = []
    filling: dict[Any, tuple[list[int], int]] = {}
    for i, (kind, size) in enumerate(members):
        bucket, filled = filling.get(kind, ([], 0))
        if not bucket or filled + size > BUCKET:
            bucket, filled = [], 0
            found.append(bucket)
        bucket.append(i)
        filling[kind] = bucket, filled + size
    return found
