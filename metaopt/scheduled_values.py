"""The schedules of one group: what they write into it, and what else may write there."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from metaopt.errors import ScheduleConflict, warn
from metaopt.schedule import Curve, Schedule

# group entry: the product of all that a scheduled rate was multiplied with in the middle of the run
LR_FACTOR = "metaopt.lr_factor"
# group entry: the proportion in which this group's rate is to the stack's, by the user's `lr_scale`
LR_SCALE = "metaopt.lr_scale"
# a rate that is set by hand before so many updates in a row has another driver
DRIVEN = 3


class ScheduledValues:
    """The schedules of one group: values are written after each update for the next one, and guarded until then."""

    def __init__(self, schedules: Mapping[str, Schedule], total_steps: int | None) -> None:
        self.schedules = dict(schedules)
        self._curves: dict[str, Curve] = {
            key: schedule.curve(total_steps, total_steps) for key, schedule in schedules.items()
        }
        self._written: dict[str, tuple[Any, int]] = {}
        self._count = 0  # of the updates made when the values were written
        # how many updates in a row had a rate that was set by hand, and the count before the last of them
        self._in_a_row = 0
        self._set_at = -1

    def value(self, key: str, t: int, group: dict[str, Any]) -> Any:
        """Return the value of one hyperparameter after `t` updates, with the group's own factors of the rate."""
        value = self._curves[key](t)
        return value * group.get(LR_SCALE, 1.0) * group.get(LR_FACTOR, 1.0) if key == "lr" else value

    def try_values(self, group: dict[str, Any]) -> None:
        """Work every value out without writing it: a schedule that has none raises before anything is changed."""
        for key in self._curves:
            self.value(key, group["metaopt.updates"], group)

    def write(self, group: dict[str, Any]) -> None:
        """Set every scheduled value for the update that comes next."""
        t: int = group["metaopt.updates"]
        self._count = t
        for key in self._curves:
            self._write(key, group, t)

    def _write(self, key: str, group: dict[str, Any], t: int) -> None:
        value: Any = self.value(key, t, group)
        # a new object each time: a 0.0 that user code puts there differs from a warm-up's 0.0
        if not isinstance(value, tuple):
            value += 0.0
        current = group.get(key)
        if isinstance(current, torch.Tensor):
            current.fill_(value)
            self._written[key] = (current, current._version)
        else:
            group[key] = value
            self._written[key] = (value, 0)

    def scale_rate(self, group: dict[str, Any], factor: float) -> None:
        """Multiply the rate by a factor, now and for the rest of the schedule if there is one."""
        self.adopt_rate(group)
        if "lr" in self.schedules:
            group[LR_FACTOR] = group.get(LR_FACTOR, 1.0) * factor
            self._write("lr", group, self._count)
        elif isinstance(group["lr"], torch.Tensor):
            group["lr"].mul_(factor)
        else:
            group["lr"] *= factor

    def are_unchanged(self, group: dict[str, Any]) -> bool:
        """Return whether every scheduled value is the very object that was written."""
        return all(group[key] is self._written[key][0] for key in self._curves)

    def check_group(self, group: dict[str, Any]) -> None:
        """Follow a count or a rate that was set by hand; raise ScheduleConflict if anything else has set a value.

        If the count has moved, a client has put a checkpoint's entries into the group: values are written anew. A rate
        that was set by hand becomes a factor of the schedule.
        """
        if group["metaopt.updates"] != self._count:
            self.write(group)
            return
        for key, (value, _) in self._written.items():
            if type(value) is float and group[key] is value:
                continue  # the usual case, at every update
            if self._is_changed(key, group) and not (key == "lr" and self._take_rate(group)):
                raise ScheduleConflict(self._conflict(key, group))

    def adopt_rate(self, group: dict[str, Any]) -> None:
        """Before anything reads or writes the rate: let one that was set by hand be a factor, if it can be."""
        if "lr" in self._written and group["metaopt.updates"] == self._count and self._is_changed("lr", group):
            self._take_rate(group)

    def _is_changed(self, key: str, group: dict[str, Any]) -> bool:
        value, version = self._written[key]
        current = group[key]
        if isinstance(current, torch.Tensor):
            return current is not value or current._version != version
        return bool(current is not value and current != value)

    def _take_rate(self, group: dict[str, Any]) -> bool:
        """Scale the schedule to a rate that was set by hand, and return True; False if something else drives it.

        torch's schedulers, and most others, leave `initial_lr` in the group; whatever sets the rate again and again is
        a driver too.
        """
        rate = float(group["lr"])  # may wait for the device, once
        scheduled = self._curves["lr"](self._count) * group.get(LR_SCALE, 1.0)
        if self._set_at != self._count:  # asked again between two updates, it is one
            self._in_a_row = self._in_a_row + 1 if self._set_at == self._count - 1 else 1
            self._set_at = self._count
        is_driven = "initial_lr" in group or self._in_a_row >= DRIVEN
        if is_driven or not scheduled or not 0.0 <= rate < math.inf:
            return False
        group[LR_FACTOR] = rate / scheduled
        current = group["lr"]
        self._written["lr"] = current, current._version if isinstance(current, torch.Tensor) else 0
        warn(
            "lr was set by hand while a schedule drives it: the rest of the schedule is scaled in the same proportion; "
            "opt.scale_lr(factor) does that without this warning",
        )
        return True

    def _conflict(self, key: str, group: dict[str, Any]) -> str:
        value, current = self._written[key][0], group[key]
        found = "a tensor that was changed" if isinstance(current, torch.Tensor) else repr(current)
        written = "its own" if isinstance(value, torch.Tensor) else repr(value)
        by_hand = (
            "; to change the rate by hand, call opt.scale_lr(factor), and to lower it by a metric, use the part plateau"
            if key == "lr"
            else ""
        )
        return (
            f"{key} is driven by the schedule {self.schedules[key]!r}, which wrote {written}, but holds {found}: "
            f"something else sets it too, most likely a torch scheduler (a Trainer makes one by default). "
            f"Either drop one of the two, or hand the other party opt.scheduler(), which only reports{by_hand}"
        )


def tag_of(key: str) -> str:
    """Return the tag of a scheduled hyperparameter other than the rate: `train/weight_decay`, `lookahead/alpha`."""
    label, _, name = key.rpartition(".")
    return f"{label or 'train'}/{name}"


def points_of(
    scheduled: Sequence[ScheduledValues], groups: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> dict[str, Any]:
    """Return the value of every scheduled hyperparameter but the rate, by tag.

    Groups that share a schedule have one tag; otherwise each has its own, below its name. The members of a tuple have
    their positions.
    """
    points: dict[str, Any] = {}
    for key in dict.fromkeys(key for own in scheduled for key in own.schedules if key != "lr"):
        having = [i for i, own in enumerate(scheduled) if key in own.schedules]
        is_shared = all(scheduled[i].schedules[key] == scheduled[having[0]].schedules[key] for i in having)
        for i in having[:1] if is_shared else having:
            tag, value = tag_of(key) if is_shared else f"{tag_of(key)}/{names[i]}", groups[i][key]
            members = {f"{tag}/{j}": member for j, member in enumerate(value)} if isinstance(value, tuple) else {}
            points.update(members or {tag: value})
    return points
