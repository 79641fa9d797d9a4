"""Scheduled values: written into the groups after each update for the next one, and guarded against other drivers."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from metaopt.errors import ScheduleConflict
from metaopt.schedule import Schedule

Entry = dict[str, Any]


class Timetable:
    """The schedules of one group's hyperparameters, closed-form, with what was written last."""

    def __init__(self, schedules: Mapping[str, Schedule], total_steps: int | None) -> None:
        self.schedules = dict(schedules)
        self._values: dict[str, Callable[[float], float]] = {
            key: schedule.curve(total_steps, total_steps) for key, schedule in schedules.items()
        }
        self._written: dict[str, tuple[Any, int]] = {}
        self._count = 0  # the updates made when the values were written

    def value(self, key: str, t: int, entry: Entry) -> float:
        """Return the value of one hyperparameter after `t` updates, `lr_scale` included."""
        value = self._values[key](t)
        return value * entry.get("metaopt.lr_scale", 1.0) if key == "lr" else value

    def write(self, entry: Entry) -> None:
        """Set every scheduled value for the update that comes next."""
        t = self._count = entry["metaopt.updates"]
        for key in self._values:
            # `+ 0.0` makes an object of our own: a 0.0 put there by someone else is then told from a warm-up's 0.0
            value = self.value(key, t, entry) + 0.0
            held = entry.get(key)
            if isinstance(held, torch.Tensor):
                held.fill_(value)
                self._written[key] = (held, held._version)
            else:
                entry[key] = value
                self._written[key] = (value, 0)

    def owns_values(self, entry: Entry) -> bool:
        """Tell whether every scheduled value is the very object that was written."""
        return all(entry[key] is self._written[key][0] for key in self._values)

    def check(self, entry: Entry) -> None:
        """Raise ScheduleConflict if a scheduled value is no longer the one that was written; reads no tensor.

        Where the count has moved a client has put a checkpoint's entries into the group: values follow the count.
        """
        if entry["metaopt.updates"] != self._count:
            self.write(entry)
            return
        for key, (value, version) in self._written.items():
            held = entry[key]
            if isinstance(held, torch.Tensor):
                foreign = held is not value or held._version != version
            else:
                foreign = held is not value and held != value
            if foreign:
                raise ScheduleConflict(self._conflict(key, held, value))

    def _conflict(self, key: str, held: Any, value: Any) -> str:
        found = "a tensor that was changed" if isinstance(held, torch.Tensor) else repr(held)
        ours = "its own" if isinstance(value, torch.Tensor) else repr(value)
        return (
            f"{key} is driven by the schedule {self.schedules[key]!r}, which wrote {ours}, but holds {found}: "
            f"something else sets it too, most likely a torch scheduler (a Trainer makes one by default). "
            f"Either drop one of the two, or hand the other party opt.scheduler(), which only reports"
        )
