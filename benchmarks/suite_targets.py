"""The targets of the problems of a suite: what a tuned AdamW has reached after three quarters of its run.

`python -m benchmarks.suite_targets [PROBLEM ...]` tunes the learning rate of AdamW with ten trials and trains with the
best one on five other seeds. It prints the median over the seeds of the target's metric at three quarters of the run,
rounded to what is easier to reach: an accuracy down to 0.01, 0.99 at most; a loss up to two digits. These numbers
are written into the problems as `targets`, but for those of the digits' convolutions, xor and
charlm, which are older.
"""

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from metaopt.lab.named import problem_named, suite_named
from metaopt.lab.trial import Trial, run_trial
from metaopt.lab.tuning import tune

SPEC = "adamw(lr=log(1e-3, 1e-1))"
TRIALS, SEEDS, SHARE = 10, range(5), 0.75


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each problem: its tuned rate, and the target that follows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("problems", nargs="*", default=suite_named("small"))
    for text in parser.parse_args(arguments).problems:
        spec, metric, value = found(text)
        print(f"{text}: {spec} has {metric} {value:.4g} at {SHARE:.0%}; target {rounded(metric, value):g}", flush=True)


def found(text: str) -> tuple[str, str, float]:
    """Return the tuned spec, the metric of the target and its median over the seeds at three quarters of the run."""
    problem = problem_named(text)
    metric, budget = next(iter(problem.targets)), problem.default_steps
    with tempfile.TemporaryDirectory() as folder:
        best = tune(SPEC, problem=text, trials=TRIALS, out=Path(folder)).best.spec
    values = []
    for seed in SEEDS:
        points = run_trial(Trial(text, best, seed, budget, budget, 1, "cpu", ""))["points"]
        values.append([at[f"validation/{metric}"] for step, at in points if step <= SHARE * budget and at][-1])
    return best, metric, median(math.inf if value is None else value for value in values)


def rounded(metric: str, value: float) -> float:
    """Return a target that is no harder than the value."""
    if metric != "loss":
        return min(0.99, math.floor(100 * value) / 100)
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit) * unit:.2g}")


if __name__ == "__main__":
    main()
