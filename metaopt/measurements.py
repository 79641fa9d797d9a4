"""Numbers that were measured: kept on their device, summed up there, and read all at once."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch

from metaopt.errors import LogError

Value = torch.Tensor | float
Key = TypeVar("Key", bound=Hashable)
Reduce = Literal["mean", "norm"]

# a window that grows beyond this many values is summed up: a 0-dim tensor holds a block of device memory
_FOLD = 256
# names that a measurement of many tensors shows at most, for each one that is asked for at either end
_KEPT_NAMES = 8


class Parts:
    """What one update measured under one tag: one number, or one for each piece of the parameters."""

    def __init__(self, reduce: Reduce) -> None:
        self.reduce = reduce
        self.values: list[Value] = []

    def whole(self) -> Value:
        """Return the number of the whole update, without waiting for a device."""
        if len(self.values) == 1:
            return self.values[0]
        devices = [value.device for value in self.values if isinstance(value, torch.Tensor)]
        # toward an accelerator: the other way would wait for it
        target = next((device for device in devices if device.type != "cpu"), None)
        values = [
            v if target is None or not isinstance(v, torch.Tensor) else v.to(target, non_blocking=True)
            for v in self.values
        ]
        if self.reduce == "norm":
            return sum(value**2 for value in values) ** 0.5
        return sum(values) / len(values)


class Tally:
    """The values of one tag since the last point; early ones may have been summed."""

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.count = 0

    def add(self, value: Value) -> None:
        self.values.append(value)
        self.count += 1
        if len(self.values) >= _FOLD:
            sums: dict[torch.device | None, Value] = {}
            for value in self.values:
                device = value.device if isinstance(value, torch.Tensor) else None
                sums[device] = sums[device] + value if device in sums else value
            self.values = list(sums.values())


def kept(tag: str, value: Value) -> Value:
    """Return a number as it is kept until it is logged. Raises LogError if it is not one number."""
    if not isinstance(value, torch.Tensor):
        try:
            return float(value)
        except (TypeError, ValueError):
            raise LogError(f"{tag} must be a number, got {value!r:.60}") from None
    if value.numel() != 1 or value.is_complex():
        raise LogError(
            f"{tag} is measured as one real number, not as a tensor of shape {tuple(value.shape)} and {value.dtype}: "
            f"reduce it first, for instance by .mean()"
        )
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    # a copy: the caller may write over its tensor before the point is written
    value = value.detach() if value.requires_grad else value
    return (value.reshape(()) if value.dim() else value).to(dtype, copy=True)


class Reading:
    """Numbers on their way to main memory. A CUDA device copies them behind its work, for which nobody has to wait."""

    def __init__(self, values: Mapping[Key, Sequence[Value]]) -> None:
        places: dict[torch.device, list[tuple[Key, int]]] = {}
        self._numbers: dict[Any, list[list[float]]] = {}
        for tag, listed in values.items():
            self._numbers[tag] = [[] if isinstance(value, torch.Tensor) else [value] for value in listed]
            for index, value in enumerate(listed):
                if isinstance(value, torch.Tensor):
                    places.setdefault(value.device, []).append((tag, index))
        # by device: how many numbers go where, all numbers one after the other, and what says that they are there
        self._parts: list[tuple[list[tuple[Any, int, int]], torch.Tensor, torch.cuda.Event | None]] = []
        for device, where in places.items():
            tensors = [t for tag, index in where if isinstance(t := values[tag][index], torch.Tensor)]
            dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
            joined = torch.cat([t.to(dtype).reshape(-1) for t in tensors])
            sizes = [(*place, tensor.numel()) for place, tensor in zip(where, tensors, strict=True)]
            if device.type == "cuda":
                self._parts.append((sizes, *_copied_behind(joined)))
            else:
                self._parts.append((sizes, joined, None))

    def is_ready(self) -> bool:
        """Return whether the copies of CUDA devices are there; reading any other device may wait."""
        return all(event is None or event.query() for _, _, event in self._parts)  # type: ignore[no-untyped-call]

    def numbers(self) -> dict[Any, list[float]]:
        """Return all values as floats, those of a longer tensor one after the other: one wait for each device."""
        for sizes, joined, event in self._parts:
            if event is not None:
                event.synchronize()
            read_here = iter(joined.tolist())
            for tag, index, size in sizes:
                self._numbers[tag][index] = [next(read_here) for _ in range(size)]
        self._parts = []
        return {tag: [number for found in listed for number in found] for tag, listed in self._numbers.items()}


def _copied_behind(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
    """Have a CUDA device copy numbers to main memory behind its work; the event says when that is done."""
    copy = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
    copy.copy_(numbers, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(numbers.device))
    return copy, event


def read(values: Mapping[Key, Sequence[Value]]) -> dict[Key, list[float]]:
    """Return all values as floats, those of a longer tensor one after the other: one wait for each device."""
    return Reading(values).numbers()


class OfTensors:
    """One number for each of many tensors: `most` of the largest and of the smallest are shown, or all if None."""

    def __init__(self, names: Sequence[str], values: torch.Tensor, most: int | None) -> None:
        self.names = tuple(names)
        self.values = values.detach().to(torch.float32, copy=True)
        self.most = most

    def shown(self, numbers: Sequence[float], before: dict[str, None]) -> dict[str, float]:
        """Return the numbers that are written, by name. `before`, names that were shown, is brought up to date.

        A tensor that was once among the largest or the smallest stays, so that its line has no gaps, until too many
        others have been there since.
        """
        by_name = dict(zip(self.names, numbers, strict=True))
        if self.most is None or len(by_name) <= 2 * self.most:
            return by_name
        # what is not a number belongs to the largest: it has to be seen
        order = sorted(by_name, key=lambda name: by_name[name] if by_name[name] == by_name[name] else float("inf"))
        for name in (*order[: self.most], *order[-self.most :]):
            before.pop(name, None)
            before[name] = None
        for name in list(before)[: -_KEPT_NAMES * self.most]:
            del before[name]
        return {name: by_name[name] for name in self.names if name in before}


class OfBins:
    """A histogram: how many numbers lie between each two edges."""

    def __init__(self, edges: Sequence[float], counts: torch.Tensor) -> None:
        self.edges = tuple(edges)
        self.values = counts.detach().to(torch.float32, copy=True)


class Point:
    """What was measured up to an update, its numbers on their way to main memory."""

    def __init__(
        self,
        update: int,
        tallies: Mapping[str, Tally],
        many: Mapping[str, OfTensors | OfBins],
        alone: Sequence[tuple[int, str, Value]],
    ) -> None:
        self.update, self.tallies, self.many, self.alone = update, tallies, many, alone
        values: dict[tuple[str, str | int], Sequence[Value]] = {}
        values.update({("mean", tag): tally.values for tag, tally in tallies.items()})
        values.update({("alone", i): [value] for i, (_, _, value) in enumerate(alone)})
        values.update({("many", tag): [found.values] for tag, found in many.items()})
        self.reading = Reading(values)
