"""`python -m benchmarks.against OLD`: is an update of this checkout slower than that of another one?

Each checkout runs in a process of its own; the two take turns, so that a busy machine slows both. The processes are
started several times, because where one happens to put its memory changes the time of every update in it.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metaopt.lab.shapes import SETS, shapes_of
from metaopt.lab.timing import Spread, ratios

HERE = Path(__file__).parent.parent
SPECS = (
    "adamw(lr=1e-3)",
    "sgd(lr=0.1, momentum=0.9)",
    "clip_grad_norm(1.0) | adamw(lr=1e-3) | lookahead(k=5)",
    "adamw(lr=1e-3) | ema(0.999)",
    "adamw(lr=1e-3) | cautious",
    "accumulate(2) | adamw(lr=1e-3)",
    "partition({'*.weight': sgd(lr=0.1, momentum=0.9), '*': adamw(lr=1e-3)})",
)
SHAPES = ("tiny", "transformer", "many")
LIMIT = 1.03
# whole cycles of two accumulated gradients and of a Lookahead of five updates
CYCLE = 10
SECONDS_OF_SAMPLE = 0.05


class Refused(Exception):
    """A checkout that cannot be used, or that refuses a spec."""


class Worker:
    """The process of one checkout."""

    def __init__(self, checkout: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        # -P: the folder of the program, in this checkout, must not come before PYTHONPATH
        command = [sys.executable, "-P", str(Path(__file__).with_name("against_worker.py"))]
        self._process = subprocess.Popen(
            command, env=environment, cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            package = self._answer()["package"]
            if Path(package) != checkout / "metaopt":
                raise Refused(f"{checkout} has no package metaopt: {package} was imported")
        except BaseException:
            self.close()
            raise

    def build(self, spec: str, shapes: list[tuple[str, tuple[int, ...]]]) -> None:
        """Build a stack and make its state. Raises Refused."""
        self._ask({"spec": spec, "shapes": shapes})
        self.run(CYCLE)

    def run(self, updates: int) -> float:
        """Return the mean seconds of so many updates."""
        return float(self._ask({"updates": updates})["seconds"])

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Refused(f"the process ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Refused(answer["error"])
        return answer


@dataclass
class Comparison:
    """The seconds of one spec over one set of shapes, round by round."""

    spec: str
    shape: str
    old: list[float] = field(default_factory=list)
    new: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """The median of the new checkout over that of the old one."""
        return statistics.median(self.new) / statistics.median(self.old)

    def is_slower(self, limit: float) -> bool:
        """Return whether the new checkout exceeds the limit, by the medians and inside the rounds.

        A machine that is busy for some rounds only moves one of the two; a slower update moves both.
        """
        return min(self.ratio, self.spread.median) > limit

    @property
    def spread(self) -> Spread:
        """The ratios inside each round."""
        return ratios(self.new, self.old)


def compare(
    old: Path, new: Path, specs: list[str], shapes: list[str], rounds: int, starts: int
) -> tuple[list[Comparison], list[str]]:
    """Return the comparisons, and a line for every spec that a checkout refuses. Raises Refused for a checkout."""
    results = {(spec, shape): Comparison(spec, shape) for shape in shapes for spec in specs}
    refusals: dict[tuple[str, str], str] = {}
    for start in range(starts):
        workers: list[Worker] = []
        try:
            for checkout in (old, new):
                workers.append(Worker(checkout))
            for key, comparison in results.items():
                if key in refusals:
                    continue
                try:
                    for worker, checkout in zip(workers, (old, new), strict=True):
                        where = checkout
                        worker.build(comparison.spec, shapes_of(comparison.shape))
                except Refused as error:
                    refusals[key] = f"{comparison.spec}, {comparison.shape}: {where} refuses it: {error}"
                    continue
                _take_turns(workers, comparison, rounds, start)
        finally:
            for worker in workers:
                worker.close()
    return [c for key, c in results.items() if key not in refusals], list(refusals.values())


def _take_turns(workers: list[Worker], comparison: Comparison, rounds: int, start: int) -> None:
    old, new = workers
    updates = CYCLE * max(1, math.ceil(SECONDS_OF_SAMPLE / CYCLE / min(old.run(CYCLE), new.run(CYCLE))))
    turns = [(old, comparison.old), (new, comparison.new)]
    for number in range(rounds):
        # whoever is first in one round is last in the next
        for worker, seconds in turns if (number + start) % 2 else turns[::-1]:
            seconds.append(worker.run(updates))


def main(arguments: list[str]) -> int:
    """Print a table; return 1 if a spec is slower than the limit, 2 if nothing can be compared, otherwise 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against", description=__doc__.partition("\n")[0])
    parser.add_argument("old", type=Path, metavar="OLD_CHECKOUT", help="the checkout that this one is compared with")
    parser.add_argument("--new", type=Path, default=HERE, help="the checkout that is compared; default this one")
    parser.add_argument("--spec", action="append", metavar="SPEC", help="instead of the usual ones; may be repeated")
    parser.add_argument("--shapes", default=",".join(SHAPES), metavar="SET,...", help=", ".join(SETS))
    parser.add_argument("--rounds", type=int, default=10, help="of each start of the processes")
    parser.add_argument("--starts", type=int, default=3, help="how often both processes are started")
    parser.add_argument("--limit", type=float, default=LIMIT, help="the largest ratio that is accepted")
    options = parser.parse_args(arguments)
    shapes = [name.strip() for name in options.shapes.split(",") if name.strip()]
    for name in shapes:
        if name not in SETS:
            parser.error(f"--shapes {name}: choose from {', '.join(SETS)}")
    if min(options.rounds, options.starts) < 1:
        parser.error("--rounds and --starts must be at least 1")
    specs = list(dict.fromkeys(options.spec or SPECS))
    try:
        results, refusals = compare(
            options.old.resolve(), options.new.resolve(), specs, shapes, options.rounds, options.starts
        )
    except (Refused, OSError) as error:
        print(f"benchmarks.against: {error}", file=sys.stderr)
        return 2
    print("| shapes | spec | ms old | ms new | new / old | in each round [quartiles] | |\n|" + " --- |" * 7)
    for result in results:
        print(_line(result, options.limit))
    for refusal in refusals:
        print(f"- {refusal}")
    if refusals:
        return 2
    return int(any(result.is_slower(options.limit) for result in results))


def _line(result: Comparison, limit: float) -> str:
    spread, slower = result.spread, "SLOWER" if result.is_slower(limit) else ""
    milliseconds = [f"{statistics.median(seconds) * 1e3:.4f}" for seconds in (result.old, result.new)]
    rounds = f"{spread.median:.3f} [{spread.low:.3f}, {spread.high:.3f}]"
    spec = result.spec.replace("|", "\\|")
    return f"| {result.shape} | {spec} | {' | '.join(milliseconds)} | {result.ratio:.3f} | {rounds} | {slower} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
