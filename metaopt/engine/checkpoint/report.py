"""What a load took, dropped and began anew, and what the caller chose for it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from metaopt.errors import CheckpointError, warn

# names that a sentence lists before it says how many more there are
SHOWN = 6


@dataclass(frozen=True)
class Choice:
    """What `load_state_dict` was asked for.

    `keep` says whose constants are in force: "live", this stack's, "saved", the checkpoint's, or None, the checkpoint's
    with a warning if they differ. `extend` allows another length of the run. `names` are those of the checkpoint's
    parameters, if it holds none.
    """

    keep: Literal["live", "saved"] | None = None
    extend: bool = False
    names: tuple[str, ...] | None = None


def changed_choice(choice: Choice, keep: Any, extend: bool | None, names: Iterable[Any] | None) -> Choice:
    """Return a choice with what is given; names may come with their parameters. Raises CheckpointError."""
    if keep not in (None, "live", "saved"):
        raise CheckpointError(f"keep must be 'live', 'saved' or None, got {keep!r:.60}")
    if isinstance(names, str):
        raise CheckpointError(f"names must be a list of names, got the text {names!r:.60}")
    found = None if names is None else tuple(str(n[0] if isinstance(n, tuple) else n) for n in names)
    return Choice(
        choice.keep if keep is None else keep,
        choice.extend if extend is None else bool(extend),
        choice.names if found is None else found,
    )


@dataclass(frozen=True)
class Difference:
    """A value that is not the same in the checkpoint and in this stack, and whose is in force."""

    key: str
    saved: Any
    live: Any
    taken: Literal["checkpoint", "stack", "schedule"]

    @property
    def value(self) -> Any:
        """The value in force."""
        return self.saved if self.taken == "checkpoint" else self.live

    def __str__(self) -> str:
        if self.taken == "checkpoint":
            return f"{self.key}={_text(self.saved)} (this stack: {_text(self.live)})"
        return f"{self.key}={_text(self.live)} (checkpoint: {_text(self.saved)})"


@dataclass
class LoadReport:
    """What came of a `load_state_dict`: labels taken from the checkpoint, started fresh, and dropped.

    `differences` are the values that differ, each with whose is in force; `new` and `gone` the names of parameters that
    only this stack or only the checkpoint has. `matched` says how parameters were found: by "names" or "positions".
    `updates` is the count and `counted` where it comes from: the "checkpoint", the "base" or, if neither counts,
    "nowhere". `lengths` are the two total steps of a run that was extended.
    """

    taken: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    matched: Literal["names", "positions"] = "positions"
    updates: int = 0
    counted: Literal["checkpoint", "base", "nowhere"] = "checkpoint"
    lengths: tuple[int, int] | None = None
    # the checkpoint has state of an unknown number of updates, and this stack has schedules
    count_is_needed: bool = False

    def add(self, difference: Difference) -> None:
        """Note a difference once, however many groups have it."""
        if not any(str(difference) == str(known) for known in self.differences):
            self.differences.append(difference)

    def __str__(self) -> str:
        def by(taken: str) -> list[str]:
            return [str(difference) for difference in self.differences if difference.taken == taken]

        parts = (
            ("taken", self.taken),
            ("started fresh", self.fresh),
            ("dropped", self.dropped),
            ("parameters without saved state, which start fresh", shown_first(self.new)),
            ("parameters that this stack does not have", shown_first(self.gone)),
            ("from the checkpoint", by("checkpoint")),
            ("kept as this stack has it", by("stack")),
            (f"from this stack's schedule after {self.updates} updates", by("schedule")),
            ("updates", [self._count()] if self.counted != "checkpoint" else []),
            ("total_steps", ["{} extended to {}".format(*self.lengths)] if self.lengths else []),
        )
        return "; ".join(f"{what}: {', '.join(labels)}" for what, labels in parts if labels)

    def _count(self) -> str:
        if self.counted == "base":
            return f"{self.updates}, as the base counts them"
        return "0, because the checkpoint does not say how many were made; set opt.updates if you know"

    def warn(self, choice: Choice) -> None:
        """Warn of what was not taken as it is: last, because a warning may be made an error."""
        unchosen = [difference for difference in self.differences if not self._is_chosen(difference, choice)]
        if self.fresh or self.dropped or self.new or self.gone or unchosen or self.count_is_needed:
            told = f"loaded a checkpoint that differs from this stack; {self}"
            if any(difference.taken == "checkpoint" for difference in unchosen):
                told += ". load_state_dict(..., keep='live') takes this stack's values, keep='saved' the checkpoint's"
            warn(told)

    def _is_chosen(self, difference: Difference, choice: Choice) -> bool:
        """Return whether the caller asked for the value that is in force."""
        if difference.taken == "stack":  # with keep="saved" too, what decides which state there is stays
            return choice.keep == "live"
        return choice.keep is not None or (difference.taken == "schedule" and self.lengths is not None)


def shown_first(names: Sequence[str]) -> list[str]:
    """Return the first names, and how many more there are."""
    more = len(names) - SHOWN
    return [*names[:SHOWN], f"{more} more"] if more > 0 else list(names)


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    return f"{value:.6g}" if isinstance(value, float) else repr(value)
