"""The memory of an update: what it keeps, what it takes for a moment, and how often it starts a kernel."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

# kernels, and what else the host starts on the device: copies, fills and whole graphs
_LAUNCHES = (
    *("cudaLaunchKernel", "cuLaunchKernel", "hipLaunchKernel", "hipExtLaunchKernel", "hipModuleLaunchKernel"),
    *("cudaMemcpyAsync", "cudaMemsetAsync", "cudaGraphLaunch", "hipMemcpy", "hipMemset", "hipGraphLaunch"),
)


@dataclass(frozen=True)
class Taken:
    """The most bytes held at once beyond those before the update, the bytes kept after it, kernel launches in it."""

    peak: int
    kept: int
    launches: int


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes behind these tensors, memory that several of them share counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def watch_memory(step: Callable[[], Any], device: torch.device | str = "cpu") -> Taken:
    """Make one update under the profiler and add up its memory records on this device."""
    kind = torch.device(device).type
    activities = [ProfilerActivity.CPU]
    if kind == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities, profile_memory=True) as recorded:
        step()
        if kind == "cuda":
            torch.cuda.synchronize()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    results = recorded.profiler.kineto_results
    records = [
        event.extra_fields
        for event in sorted(_all(results.experimental_event_tree()), key=lambda event: event.start_time_ns)
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == kind
    ]
    # what an earlier profile saw allocated may be released in this one, by whoever held it: it is none of the update's
    allocated: dict[int, int] = {}
    now = peak = 0
    for record in records:
        now += record.alloc_size if record.alloc_size > 0 else -allocated.pop(record.ptr, 0)
        if record.alloc_size > 0:
            allocated[record.ptr] = record.alloc_size
        peak = max(peak, now)
    return Taken(peak, now, sum(event.name().startswith(_LAUNCHES) for event in results.events()))


def _all(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _all(event.children)


def watch_cycle(
    step: Callable[[], Any], before: Callable[[], Any], updates: int, device: torch.device | str = "cpu"
) -> tuple[int, float]:
    """Return the most that one of several updates took for a moment, and their mean number of kernel launches."""
    taken = []
    for _ in range(updates):
        before()
        taken.append(watch_memory(step, device))
    # what stays is state, not a temporary
    return max(t.peak - max(0, t.kept) for t in taken), sum(t.launches for t in taken) / updates
