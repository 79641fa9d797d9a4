"""Checks of tuners: they make the trials that they were asked for, repeat themselves, and find a wide valley."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from metaopt.lab.search import points
from metaopt.space import Space
from metaopt.specs.parsing import parse_value
from metaopt.testing.outcome import CheckFailed, check
from metaopt.testing.subject import Subject
from metaopt.tuner import Point, Task, Tried, Tuner

SPACES = ("log(1e-4, 1e-1)", "uniform(0.0, 1.0)", "choice('a', 'b')")


class Valley(Task):
    """A search without a training run: the loss is a bowl on a logarithmic and an even axis, less for one option."""

    def __init__(self, folder: Path, trials: int, seed: int) -> None:
        self.spaces: Mapping[str, Space] = {text.partition("(")[0]: parse_value(text) for text in SPACES}
        self.trials, self.seed, self.jobs, self.budget = trials, seed, 1, 90
        self.folder, self.name = folder, f"valley-{seed}"

    def points(self, count: int) -> list[Point]:
        return points(len(self.spaces), count, self.seed)

    def losses(self, tried: Sequence[Tried]) -> list[float]:
        return [self.loss(each) for each in tried]

    def loss(self, tried: Tried) -> float:
        rate, other, option = self.values(tried.point).values()
        bowl: float = (math.log10(rate) + 2.0) ** 2 + (other - 0.3) ** 2 + 1.0 / tried.share
        return bowl + (0.5 if option == "a" else 0.0)


class TunerSubject(Subject):
    """A tuner, made from its text."""

    def run(self, seed: int = 0, trials: int = 20) -> tuple[Valley, list[Tried]]:
        """Return a task and what a new tuner tries on it."""
        made = parse_value(self.text)
        if not isinstance(made, Tuner):
            raise CheckFailed(f"{self.text} is not a tuner", "It was registered as one", "Subclass metaopt.Tuner")
        with tempfile.TemporaryDirectory() as folder:
            task = Valley(Path(folder) / "trials", trials, seed)
            return task, made.run(task)


@check("tuner")
def makes_the_trials_that_it_was_asked_for(subject: TunerSubject) -> None:
    """It starts as many settings as it was asked for, inside the space, and trains one of them to its end."""
    task, tried = subject.run()
    started = {each.point for each in tried}
    inside = all(len(p) == len(task.spaces) and all(0.0 <= u <= 1.0 for u in p) for p in started)
    if len(started) != task.trials or not inside or not any(each.share == 1.0 for each in tried):
        raise CheckFailed(
            f"{subject}: asked for {task.trials} settings, it tried {len(started)}"
            + ("" if inside else ", some outside the space"),
            "Searches are compared at the same number of trials",
            "Return every metaopt.Tried from run(), at least one with share=1.0",
        )


@check("tuner")
def tries_the_same_for_the_same_seed(subject: TunerSubject) -> None:
    """The same seed gives the same settings; another seed gives others."""
    (_, first), (_, again), (_, other) = subject.run(), subject.run(), subject.run(seed=1)
    if first != again or first == other:
        raise CheckFailed(
            f"{subject}: two searches with one seed differ, or two seeds give one search",
            "A search that was interrupted goes on as if it had not been",
            "Draw from a generator that is made from task.seed and the number of the trial",
        )


@check("tuner", presumes=("makes_the_trials_that_it_was_asked_for",))
def finds_a_wide_valley(subject: TunerSubject) -> None:
    """Its best of 20 trials is as good as the best of 10 even ones, as the median of five seeds."""
    better = 0
    for seed in range(5):
        task, tried = subject.run(seed)
        best = min(task.loss(each) for each in tried if each.share == 1.0)
        better += best <= min(task.loss(Tried(point)) for point in task.points(10))
    if better < 3:
        raise CheckFailed(
            f"{subject}: its best of 20 is worse than the best of 10 even settings for {5 - better} of 5 seeds",
            "A search that learns nothing from its trials need not be learned",
            "Compare what it tries with task.points(task.trials)",
        )
