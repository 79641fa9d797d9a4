"""Rates that move on: a study goes on beyond its range while its best rate is the outermost one.

Where a range lies is a matter of units. A study that ends with worse rates on both sides of its best one has found the
same, whatever the unit: only then are an optimizer and itself in another unit exchangeable.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from metaopt.lab.plan import Plan
from metaopt.lab.trial import Trial


@dataclass
class Moving:
    """One study of a contender as it is made: its trials by rate, and how many of them are beyond each end.

    The trials of a contender with spaces are by spec: its ranges are the user's own, and stay.
    """

    plan: Plan
    position: int
    number: int
    below: int = 0
    above: int = 0
    trials: dict[Any, Trial] = field(init=False)

    def __post_init__(self) -> None:
        self.trials = self.plan.study(self.position, self.number)

    def moves_on(self, losses: Mapping[Trial, float]) -> bool:
        """Take one rate more beyond the end at which the best one is; tell whether there was need and room."""
        if self.below + self.above >= self.plan.moves or any(isinstance(key, str) for key in self.trials):
            return False
        side = outermost([losses[trial] for trial in self.trials.values()])
        if side == 0 or self.plan.given[side > 0]:
            return False
        self.below, self.above = self.below + (side < 0), self.above + (side > 0)
        place = self.plan.trials - 1 + self.above if side > 0 else -self.below
        rate = self.plan.rate(self.position, self.number, place)
        new = {rate: self.plan.trial(self.position, rate, self.number)}
        self.trials = {**self.trials, **new} if side > 0 else {**new, **self.trials}
        return True


def outermost(losses: Sequence[float]) -> int:
    """Return -1 or 1 where the least loss is the first or the last alone, else 0; where all diverged it is below."""
    if all(map(math.isinf, losses)):
        return -1
    least = min(losses)
    if losses[0] == least < losses[1]:
        return -1
    return 1 if losses[-1] == least < losses[-2] else 0
