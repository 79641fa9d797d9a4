"""Weights and averages of 16 bits that stand still: what is added to them is below their resolution."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from metaopt.errors import warn

# updates after which samples are compared, once
UPDATES = 100
# tensors that are sampled, and elements of each
TENSORS = 64
ELEMENTS = 256
# of the elements that should have moved, the share that must not have
STILL = 0.9
NAMED = 3
FIX = (
    "Keep the weights in float32 and run the model under torch.autocast(device_type, dtype=torch.bfloat16), or raise "
    "the learning rate"
)


class Kept:
    """Some elements of a tensor as they were: of a parameter, or of an average of it."""

    def __init__(
        self, name: str, p: torch.Tensor, group: Mapping[str, Any], key: str, tensor: torch.Tensor, fix: str
    ) -> None:
        self.name, self.p, self.group, self.key, self.fix = name, p, group, key, fix
        self._tensor = tensor
        self._elements = _some(tensor).clone()
        self._weights = _some(p).clone() if key else self._elements

    def still(self, state: Mapping[Any, Any]) -> torch.Tensor | None:
        """Return how many elements did not move, and how many should have; None if that cannot be said now."""
        if self.key:
            if state.get(self.p, {}).get(self.key) is not self._tensor:
                return None  # a checkpoint was loaded
            due = _some(self.p) != self._weights
        else:
            gradient, rate = self.p.grad, self.group.get("lr")
            if rate is not None and float(rate) == 0.0:
                return None
            if gradient is None or type(gradient) is not torch.Tensor or gradient.is_sparse:
                return None
            due = _some(gradient) != 0
        return torch.stack([((_some(self._tensor) == self._elements) & due).sum(), due.sum()]).cpu()


class StillWatch:
    """Samples of weights and averages of 16 bits; `check` warns once if most of them have not moved."""

    def __init__(self, kept: Sequence[Kept], updates: int) -> None:
        self._kept = _spread(kept)
        self._due = updates + UPDATES

    def check(self, state: Mapping[Any, Any], updates: int) -> "StillWatch | None":
        """Compare after so many updates, while the gradients of the last one are there; return None if that is done."""
        if updates < self._due:
            return self
        found: dict[str, list[str]] = {}
        for kept in self._kept:
            counts = kept.still(state)
            if counts is not None and counts[1] and counts[0] >= STILL * counts[1]:
                found.setdefault(kept.fix, []).append(kept.name)
        for fix, names in found.items():
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            warn(
                f"{', '.join(names[:NAMED])}{more}: at least {STILL:.0%} of the elements are what they were "
                f"{UPDATES} updates ago. What is added to them is lost to the rounding of 16 bits. {fix}",
            )
        return None


def still_watch(
    slots: Iterable[tuple[Mapping[str, Any], Sequence[tuple[str, str]]]],
    state: Mapping[Any, Any],
    names: Callable[[], Mapping[torch.Tensor, str]],
    updates: int,
) -> StillWatch | None:
    """Return a watch over what has 16 bits, or None; `slots` are the groups, with keys of averages and what helps."""
    kept: list[Kept] = []
    called: Mapping[torch.Tensor, str] | None = None
    for group, averages in slots:
        for p in group["params"]:
            if not _has_16_bits(p):
                continue
            called = names() if called is None else called
            kept.append(Kept(called[p], p, group, "", p, FIX))
            for key, fix in averages:
                average = state.get(p, {}).get(key)
                if average is not None and _has_16_bits(average):
                    kept.append(Kept(f"{key} of {called[p]}", p, group, key, average, fix))
    return StillWatch(kept, updates) if kept else None


def _has_16_bits(tensor: torch.Tensor) -> bool:
    """Return whether a tensor holds floating-point numbers of 16 bits, whole on this process."""
    return tensor.dtype in (torch.bfloat16, torch.float16) and type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _some(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // ELEMENTS)][:ELEMENTS]


def _spread(kept: Sequence[Kept]) -> list[Kept]:
    return list(kept[:: max(1, len(kept) // TENSORS)][:TENSORS])
