"""The TensorBoard runs of a comparison: one per contender and study, and one per contender of the median."""

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from metaopt.errors import LogError
from metaopt.lab.plan import Plan
from metaopt.logger import HyperValue, Logger
from metaopt.registry import registry
from metaopt.specs.pipeline import parse

MEDIAN = "median"
FINAL = "test/loss"
MARK = ".metaopt-compare"

Result = dict[str, Any]


class Runs:
    """The folder `tensorboard` of a comparison: the best run of every study. Raises LogError."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan = plan
        self._folder = folder / "tensorboard"
        if self._folder.exists() and not (self._folder / MARK).exists():
            raise LogError(f"{self._folder} is there and no comparison made it: choose another --out")

    def write(self, contenders: Sequence[Any]) -> None:
        """Write all runs, in place of what an earlier call left there."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        (self._folder / MARK).touch()  # nothing else is ever removed
        for position, contender in enumerate(contenders):
            for number, run in enumerate(contender.runs):
                self._study(position, number, run)
            self._median(position, contender.runs)

    def name(self, position: int) -> str:
        """Return a contender's name in TensorBoard: its place and its parts, `2-sgd-lookahead`."""
        parts = [part.label or part.name for part in parse(self._plan.specs[position])]
        return re.sub(r"[^a-z0-9_.-]+", "", f"{position + 1}-{'-'.join(parts)}")[:80]

    def _study(self, position: int, number: int, result: Result) -> None:
        """Write the run of one study; x is the number of updates."""
        points = {int(step): _numbers(values) for step, values in result["points"]}
        self._run(f"{self.name(position)}/study-{number}", result, points, _number(result["test"]["loss"]))

    def _median(self, position: int, results: Sequence[Result]) -> None:
        """Write the median over studies, under the tags of the studies' own runs; one that diverged has "
        "infinite losses."""
        runs = [{int(step): _numbers(values) for step, values in result["points"]} for result in results]
        steps = sorted({step for run in runs for step in run})
        tags = list(dict.fromkeys(tag for run in runs for values in run.values() for tag in values))
        points: dict[int, dict[str, float]] = {}
        for step in steps:
            for tag in tags:
                values = [run[step][tag] for run in runs if tag in run.get(step, {})]
                if values and tag.endswith("loss"):
                    values += [math.inf] * sum(not run.get(step) for run in runs)
                if values:
                    points.setdefault(step, {})[tag] = median(values)
        final = median([_number(result["test"]["loss"]) for result in results])
        self._run(f"{self.name(position)}/{MEDIAN}", results[0], points, final)

    def _run(self, name: str, result: Result, points: Mapping[int, Mapping[str, float]], final: float) -> None:
        logger: Logger = registry.find("tensorboard", "logger").target(self._folder / name, metric=FINAL)
        hparams: dict[str, HyperValue] = result["hparams"]
        logger.open(step=0, tags=(), spec=result["spec"], hparams=hparams)
        for step, values in points.items():
            logger.scalars(step, values)
        logger.scalars(result["updates"], {FINAL: final})
        logger.close()


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    return {tag: _number(value) for tag, value in values.items()}


def _number(value: float | None) -> float:
    return math.inf if value is None else value
