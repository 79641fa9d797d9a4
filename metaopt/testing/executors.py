"""What proves an executor: a comparison has the results that it has on the processes of this machine."""

from typing import Any

from metaopt.lab.comparison import Comparison

# where a result was made and how long that took is no part of it
OF_THE_PLACE = ("where", "jobs", "seconds")


def results_of(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the results of all trials, without what depends on the place: two places give equal lists."""
    runs = [run for contender in comparison.contenders for study in contender.studies for run in study.trials.values()]
    return [{key: value for key, value in run.items() if key not in OF_THE_PLACE} for run in runs]
