"""Parameters of a model that were frozen when its stack was built: announced once if they begin to train."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from metaopt.errors import warn

# parameters that one update looks at: what is unfrozen is seen soon, and thousands of them cost little
AT_A_TIME = 16
NAMED = 3


class LeftOut:
    """Parameters that no group holds; `check` warns once if they get gradients. They are not kept alive."""

    def __init__(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._waiting = [(name, weakref.ref(p)) for name, p in named]
        self._next = 0

    def check(self, groups: Sequence[Mapping[str, Any]]) -> "LeftOut | None":
        """Look at the next few parameters, between the backward pass and an update; return None if that was the last.

        Another optimizer may hold them, so this is a warning and not an error.
        """
        begin = self._next if self._next < len(self._waiting) else 0
        self._next = begin + AT_A_TIME
        if not any(_trains(reference()) for _, reference in self._waiting[begin : self._next]):
            return self if self._waiting else None
        held = {id(p) for group in groups for p in group["params"]}
        alive = [(name, p) for name, reference in self._waiting if (p := reference()) is not None]
        self._waiting = [(name, weakref.ref(p)) for name, p in alive if id(p) not in held]
        names = [name for name, p in alive if id(p) not in held and _trains(p)]
        if not names:
            return self if self._waiting else None
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        warn(
            f"{', '.join(names[:NAMED])}{more}: frozen when the stack was built, so in none of its groups, but with "
            f"gradients now: the stack does not update what it does not hold. Add them with opt.add_param_group("
            f"{{'params': ...}}), or build the stack before you freeze them",
        )
        return None


def _trains(p: torch.Tensor | None) -> bool:
    return p is not None and p.requires_grad and p.grad is not None
