"""The processes that `torchrun` starts: which of them this is, and how they agree."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import distributed
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from metaopt.lab.device import usable_device

# what torch's backends say of a peer that has ended, or was never there
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "NCCL", "recv")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together: its `rank`, their number `size`, and its own `device`.

    `group` is theirs on processors, for what they agree on; checkpoints have a group of their own. A process that
    trains by itself is rank 0 of 1.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    group: Any = None
    store: Any = field(default=None, repr=False)

    def from_first(self, value: Any) -> Any:
        """Return what rank 0 gives."""
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def gathered(self, value: Any, group: Any = None) -> list[Any]:
        """Return what every rank gives, in their order."""
        values = [value] * self.size
        if self.size > 1:
            distributed.all_gather_object(values, value, group=group or self.group)
        return values

    def is_first_to_tell(self) -> bool:
        """Return whether no other rank has told of an error: what ends one of them ends all, and is told once."""
        if self.store is None:
            return True
        try:
            return bool(self.store.add("metaopt/told", 1) == 1)
        except RuntimeError:  # whoever keeps the store has ended, and has told why
            return False


def number_of_ranks() -> int:
    """Return how many processes torchrun has started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def restarts() -> int:
    """Return how often torchrun has started this run again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def this_rank() -> Ranks:
    """Return which of torchrun's processes this is; the others are known by a store alone until they are joined."""
    if number_of_ranks() == 1:
        return Ranks()
    store, rank, size = next(rendezvous("env://"))
    # torchrun keeps one store over its restarts: what the processes before wrote there is not to be read as these ones'
    return Ranks(rank, size, store=PrefixStore(f"metaopt/{restarts()}", store))


@contextmanager
def joined(ranks: Ranks, device: str) -> Iterator[Ranks]:
    """Join the processes that torchrun has started, over gloo or what fits the device; alone, do nothing.

    Each process gets the device of its number on its machine: "cuda" is `cuda:LOCAL_RANK`. Raises ProblemError.
    """
    if ranks.size == 1:
        yield replace(ranks, device=usable_device(device))
        return
    own = usable_device(_own(device))
    if torch.device(own).type != "cpu":
        torch.accelerator.set_device_index(torch.device(own).index)
    backend = distributed.get_default_backend_for_device(own)
    distributed.init_process_group(backend, store=ranks.store, rank=ranks.rank, world_size=ranks.size)
    group = distributed.group.WORLD if backend == "gloo" else distributed.new_group(backend="gloo")
    yield replace(ranks, device=own, group=group)
    # not behind an error: the others may wait in a collective, and this process is to end
    with suppress(RuntimeError):
        distributed.destroy_process_group()


def lost_contact(error: BaseException) -> bool:
    """Return whether an error says that another rank has ended."""
    if isinstance(error, distributed.DistBackendError | distributed.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error) and any(words in str(error) for words in _LOST)


def _own(device: str) -> str:
    local = os.environ.get("LOCAL_RANK", "0")
    return device if device == "cpu" or ":" in device else f"{device}:{local}"
