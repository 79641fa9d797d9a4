"""A run that goes on after the update that its schedules took for the last one."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from metaopt.errors import warn
from metaopt.schedule import Schedule


def last_update(schedules: Sequence[Mapping[str, Schedule]], total_steps: int | None) -> float:
    """Return the count at which schedules of any group end because the run does; infinity if none does."""
    if total_steps is None or not any(_ends_with_run(schedule) for own in schedules for schedule in own.values()):
        return math.inf
    return total_steps


def warn_of_past_end(
    schedules: Sequence[Mapping[str, Schedule]],
    groups: Sequence[Mapping[str, Any]],
    updates: int,
    total_steps: int | None,
) -> None:
    """Warn that the run has made more updates than its schedules were built for."""
    held: dict[str, str] = {}
    for own, group in zip(schedules, groups, strict=True):
        for key, schedule in own.items():
            if _ends_with_run(schedule):
                held.setdefault(key, _text(group[key]))
    values = ", ".join(f"{key}={value}" for key, value in held.items())
    warn(
        f"this was update {updates} of a run of total_steps={total_steps}: schedules that run to "
        f"the end of it keep their last values from now on ({values}). Give total_steps as the number of updates that "
        f"are made; to go on with a run, build the stack with more of them and load with extend=True"
    )


def _ends_with_run(schedule: Schedule) -> bool:
    """Return whether a schedule needs to know how long the run is."""
    try:
        schedule.curve(None, None)
    except Exception:  # a schedule from elsewhere may compute with the length, which is None here: whatever that raises
        return True
    return False


def _text(value: Any) -> str:
    return f"({', '.join(map(_text, value))})" if isinstance(value, tuple) else f"{float(value):.3g}"
