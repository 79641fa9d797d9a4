"""The TensorBoard runs of a comparison: one per contender, the median of its studies with a band around it.

More than 40 runs and TensorBoard selects none at the start: single studies are written only if somebody asks.
"""

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metaopt.errors import LogError
from metaopt.lab.bands import quartiles
from metaopt.lab.plan import Plan
from metaopt.logger import HyperValue, Layout, Logger, Margin
from metaopt.registry import registry
from metaopt.specs.parsing import parse

MARK = ".metaopt-compare"

Result = dict[str, Any]
Points = Mapping[int, Mapping[str, float]]


class Runs:
    """The folder `tensorboard` of a comparison. Raises LogError."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan = plan
        self._folder = folder / "tensorboard"
        if self._folder.exists() and not (self._folder / MARK).exists():
            raise LogError(f"{self._folder} is there and no comparison made it: choose another --out")

    def write(self, contenders: Sequence[Any], all_seeds: bool = False) -> None:
        """Write a run per contender, and one per study where asked, in place of what an earlier call left there."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        (self._folder / MARK).touch()  # nothing else is ever removed
        for name, contender in zip(names(self._plan.specs), contenders, strict=True):
            # the stack that is shown is that of the study in the middle
            middle = sorted(contender.runs, key=lambda run: _number(run["test"]["loss"]))[len(contender.runs) // 2]
            last = max(run["updates"] for run in contender.runs)
            self._run(name, middle, _together([_points(run, last) for run in contender.runs]))
            for number, run in enumerate(contender.runs if all_seeds else ()):
                self._run(f"{name}/study-{number}", run, _points(run, run["updates"]))

    def _run(self, name: str, result: Result, points: Points) -> None:
        logger: Logger = registry.find("tensorboard", "logger").target(self._folder / name)
        hparams: dict[str, HyperValue] = result["hparams"]
        logger.open(step=0, tags=(), spec=result["spec"], hparams=hparams)
        for step, values in points.items():
            logger.scalars(step, values)
        logger.close()


def names(specs: Sequence[str]) -> list[str]:
    """Return the contenders' names in TensorBoard: place and parts, `2-sgd-lookahead`; arguments if those repeat."""
    short = ["-".join(part.label or part.name for part in parse(spec)) for spec in specs]
    said = [name if short.count(name) == 1 else spec for name, spec in zip(short, specs, strict=True)]
    return [
        f"{number}-{re.sub(r'[^A-Za-z0-9_.=]+', '-', name).strip('-.')}"[:80].rstrip("-.")
        for number, name in enumerate(said, 1)
    ]


def charts(contenders: Sequence[Any]) -> Layout:
    """Return the charts of a comparison: each is a line per contender, the median, in a band between the quartiles."""
    known = {tag for contender in contenders for run in contender.runs for _, values in run["points"] for tag in values}
    sections: dict[str, dict[str, Margin]] = {}
    for tag in sorted(known, key=lambda tag: (not tag.startswith("validation/"), not tag.startswith("train/"), tag)):
        section = tag.partition("/")[0]
        studies = len(contenders[0].runs)
        title = f"{section}: median and quartiles of {studies} studies"
        sections.setdefault(title, {})[tag] = Margin((tag, *_ends(tag)))
    return sections


def _ends(tag: str) -> tuple[str, str]:
    """Return the tags of the lower and the upper quartile: a section of their own, away from the medians."""
    return f"quartiles/{tag}/lower", f"quartiles/{tag}/upper"


def _points(result: Result, last: int) -> dict[int, dict[str, float]]:
    """Return what a study logged, by the number of updates, and its result on test data after the `last` of them."""
    points = {int(step): {tag: _number(value) for tag, value in values.items()} for step, values in result["points"]}
    final = {f"test/{name}": _lost(name) if value is None else value for name, value in result["test"].items()}
    points.setdefault(last, {}).update(final)
    return points


def _together(studies: Sequence[Points]) -> dict[int, dict[str, float]]:
    """Return medians and quartiles; a study that has ended early is as bad as can be from there on."""
    steps = sorted({step for points in studies for step in points})
    tags = list(dict.fromkeys(tag for points in studies for values in points.values() for tag in values))
    found: dict[int, dict[str, float]] = {step: {} for step in steps}
    for tag in tags:
        judged = tag.endswith("loss") or tag.startswith("validation/")
        for step in steps:
            values = [points[step][tag] for points in studies if tag in points.get(step, {})]
            if not values:
                continue
            if judged:
                values += [_lost(tag)] * (len(studies) - len(values))
            low, middle, high = map(float, quartiles(values))
            found[step] |= {tag: middle, **dict(zip(_ends(tag), (low, high), strict=True))}
    return found


def _lost(name: str) -> float:
    """Return the worst value of a metric: a loss is to be small, anything else large."""
    return math.inf if name.endswith("loss") else -math.inf


def _number(value: float | None) -> float:
    return math.inf if value is None else value
