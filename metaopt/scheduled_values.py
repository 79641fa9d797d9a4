"""The schedules of one group: what they write into it, and what else may write there."""

from collections.abc import Mapping
from typing import Any

import torch

from metaopt.errors import ScheduleConflict
from metaopt.schedule import Curve, Schedule

# group entry: the product of what `Run.change_lr` has multiplied a scheduled rate with
LR_FACTOR = "metaopt.lr_factor"


class ScheduledValues:
    """The schedules of one group: values are written after each update for the next one, and guarded until then."""

    def __init__(self, schedules: Mapping[str, Schedule], total_steps: int | None) -> None:
        self.schedules = dict(schedules)
        self._curves: dict[str, Curve] = {
            key: schedule.curve(total_steps, total_steps) for key, schedule in schedules.items()
        }
        self._written: dict[str, tuple[Any, int]] = {}
        self._count = 0  # of the updates made when the values were written

    def value(self, key: str, t: int, group: dict[str, Any]) -> Any:
        """Return the value of one hyperparameter after `t` updates, with the group's own factors of the rate."""
        value = self._curves[key](t)
        return value * group.get("metaopt.lr_scale", 1.0) * group.get(LR_FACTOR, 1.0) if key == "lr" else value

    def write(self, group: dict[str, Any]) -> None:
        """Set every scheduled value for the update that comes next."""
        t = self._count = group["metaopt.updates"]
        for key in self._curves:
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

    def are_unchanged(self, group: dict[str, Any]) -> bool:
        """Return whether every scheduled value is the very object that was written."""
        return all(group[key] is self._written[key][0] for key in self._curves)

    def raise_if_changed(self, group: dict[str, Any]) -> None:
        """Raise ScheduleConflict if a scheduled value is not the one that was written; reads no tensor.

        If the count has moved, a client has put a checkpoint's entries into the group: values follow the count.
        """
        if group["metaopt.updates"] != self._count:
            self.write(group)
            return
        for key, (value, version) in self._written.items():
            current = group[key]
            if isinstance(current, torch.Tensor):
                changed = current is not value or current._version != version
            else:
                changed = current is not value and current != value
            if changed:
                raise ScheduleConflict(self._conflict(key, current, value))

    def _conflict(self, key: str, current: Any, value: Any) -> str:
        found = "a tensor that was changed" if isinstance(current, torch.Tensor) else repr(current)
        written = "its own" if isinstance(value, torch.Tensor) else repr(value)
        return (
            f"{key} is driven by the schedule {self.schedules[key]!r}, which wrote {written}, but holds {found}: "
            f"something else sets it too, most likely a torch scheduler (a Trainer makes one by default). "
            f"Either drop one of the two, or hand the other party opt.scheduler(), which only reports"
        )
