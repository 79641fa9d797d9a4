"""Timing updates on any device: by a clock of the processor, or by events where the device works on its own."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sample:
    """Mean seconds of one update: on the device, and until the call returned to the program."""

    device: float
    host: float


def sample(device: torch.device, before: Callable[[], Any], step: Callable[[], Any], times: int) -> Sample:
    """Time `step` alone, `times` times, with `before` ahead of each."""
    if device.type == "cpu":
        seconds = _on_host(before, step, times)
        return Sample(seconds, seconds)
    if device.type == "cuda":
        return _by_events(device, before, step, times)
    return _by_waiting(before, step, times)


def _on_host(before: Callable[[], Any], step: Callable[[], Any], times: int) -> float:
    # what other programs do moves the time of one thread the least
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    total = 0.0
    for _ in range(times):
        before()
        began = clock()
        step()
        total += clock() - began
    return total / times


def _by_events(device: torch.device, before: Callable[[], Any], step: Callable[[], Any], times: int) -> Sample:
    """Nothing waits for the device until all is queued; a device that runs dry between two events counts too."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]  # type: ignore[no-untyped-call]
    host = 0.0
    with torch.cuda.device(device):
        for first, last in pairs:
            before()
            first.record()
            began = time.perf_counter()
            step()
            host += time.perf_counter() - began
            last.record()
        torch.cuda.synchronize()
    milliseconds = sum(first.elapsed_time(last) for first, last in pairs)
    return Sample(milliseconds / 1000.0 / times, host / times)


def _by_waiting(before: Callable[[], Any], step: Callable[[], Any], times: int) -> Sample:
    total = host = 0.0
    for _ in range(times):
        before()
        torch.accelerator.synchronize()
        began = time.perf_counter()
        step()
        host += time.perf_counter() - began
        torch.accelerator.synchronize()
        total += time.perf_counter() - began
    return Sample(total / times, host / times)
