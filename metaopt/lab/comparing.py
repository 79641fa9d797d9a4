"""Comparing in Python, as `metaopt compare` does it: `from metaopt.lab import compare`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from metaopt.lab.comparison import Comparison, run_comparison
from metaopt.lab.named import suite_named, text_of
from metaopt.lab.overall import Overall
from metaopt.lab.plan import plan_comparison
from metaopt.lab.several import folders
from metaopt.problem_class import Problem


def compare(
    specs: Sequence[str],
    *,
    problem: str | Problem = "digits",
    out: Path | str = "runs/compare",
    progress: Callable[[int, int], None] = lambda done, total: None,
    retry_failed: bool = False,
    all_seeds: bool = False,
    **options: Any,
) -> Comparison:
    """Compare optimizers as `metaopt compare` does, whose options these are, and write what it writes into `out`.

    `problem` is a name, `my_module:name`, or a problem, such as `metaopt.problem(...)` at the top level of a module.
    Options: `baseline`, `studies`, `trials`, `steps`, `tune`, `lr_min`, `lr_max`, `device`, `jobs`, `plugins`, `on`,
    `retries`, `sensitivity`. Guard a script with `if __name__ == "__main__":` where `jobs` is above 1: its processes
    import it. Raises MetaoptError.
    """
    named = text_of(problem, options.get("jobs", 1))
    plan = plan_comparison(problem=named, specs=list(map(str, specs)), out=Path(out), **options)
    comparison = run_comparison(plan, progress, retry_failed, all_seeds)
    comparison.save()
    return comparison


def compare_all(
    specs: Sequence[str],
    *,
    problems: Sequence[str | Problem] = (),
    suite: str | None = None,
    out: Path | str = "runs/compare",
    **options: Any,
) -> Overall:
    """Compare optimizers on several problems, or on those of a suite such as "small", each in a folder below `out`.

    The options are those of `compare`. Raises MetaoptError.
    """
    named = [
        *(text_of(problem, options.get("jobs", 1)) for problem in problems),
        *(suite_named(suite) if suite else ()),
    ]
    below = folders(named, Path(out))
    found = Overall([compare(specs, problem=text, out=folder, **options) for text, folder in below.items()], Path(out))
    found.save()
    return found
