"""Comparing in Python, as `metaopt compare` does it: `from metaopt.lab import compare`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from metaopt.lab.comparison import Comparison, run_comparison
from metaopt.lab.plan import plan_comparison


def compare(
    specs: Sequence[str],
    *,
    problem: str = "digits",
    out: Path | str = "runs/compare",
    progress: Callable[[int, int], None] = lambda done, total: None,
    retry_failed: bool = False,
    **options: Any,
) -> Comparison:
    """Compare optimizers as `metaopt compare` does, whose options these are, and write what it writes into `out`.

    Options: `baseline`, `studies`, `trials`, `steps`, `tune`, `lr_min`, `lr_max`, `device`, `jobs`, `plugins`, `on`,
    `retries`. Guard a
    script with `if __name__ == "__main__":` where `jobs` is above 1: its processes import it. Raises MetaoptError.
    """
    plan = plan_comparison(problem=problem, specs=list(map(str, specs)), out=Path(out), **options)
    comparison = run_comparison(plan, progress, retry_failed)
    comparison.save()
    return comparison
