"""What comparisons on several problems say together: time to target as a profile, ranks, evaluations saved."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from metaopt.errors import ProblemError
from metaopt.lab import profiles
from metaopt.lab.circumstances import digest
from metaopt.lab.comparison import Comparison, Contender
from metaopt.lab.holding import held, write_bytes, write_text
from metaopt.lab.profiles import Estimate
from metaopt.lab.report import as_table
from metaopt.lab.report import rows as verdict_rows
from metaopt.lab.savings import evaluations_saved_by_study


class Overall:
    """Comparisons of the same contenders on several problems, in the order in which they were made."""

    def __init__(self, comparisons: Sequence[Comparison], out: Path) -> None:
        specs = [comparison.plan.specs for comparison in comparisons]
        if len(comparisons) < 2 or any(other != specs[0] for other in specs):
            raise ProblemError("several problems must be two or more, each with the same contenders in the same order")
        self.comparisons, self.out = list(comparisons), out
        self.specs = specs[0]

    @property
    def problems(self) -> list[str]:
        """The problems, as text."""
        return [comparison.plan.problem for comparison in self.comparisons]

    @property
    def times(self) -> list[profiles.Numbers]:
        """For each problem the evaluations to the target, contenders by studies; infinite where it was missed."""
        return [np.array([c.reached for c in comparison.contenders]) for comparison in self.comparisons]

    @cached_property
    def scores(self) -> list[Estimate]:
        """Each contender's area under its performance profile, with its interval over studies."""
        return profiles.score_estimates(self.times)

    @cached_property
    def ranks(self) -> list[Estimate]:
        """Each contender's mean rank by test loss, 1 the best, with its interval over studies."""
        return profiles.rank_estimates(
            [np.array([c.losses for c in comparison.contenders]) for comparison in self.comparisons]
        )

    @cached_property
    def saved(self) -> list[Estimate | None]:
        """The share of the budget that each contender saves for the baseline's final loss; None for the baseline."""
        return [self._saved(position) for position in range(len(self.specs))]

    @cached_property
    def winner(self) -> str | None:
        """The spec that is soonest over these problems, by more than the studies scatter, or None."""
        found = profiles.winner(self.times)
        return None if found is None else self.specs[found]

    def solved(self, position: int) -> int:
        """Return on how many problems half of a contender's studies or more met the target."""
        return int(np.isfinite([np.median(problem[position]) for problem in self.times]).sum())

    def _saved(self, position: int) -> Estimate | None:
        shares = []
        for comparison in self.comparisons:
            contender = comparison.contenders[position]
            if contender is comparison.baseline:
                return None
            shares.append(_shares(contender, comparison.baseline, comparison.plan.budget))
        return profiles.mean_estimate(shares)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON has them."""
        return {
            "problems": self.problems,
            "contenders": [
                {
                    "spec": spec,
                    "score": asdict(self.scores[position]),
                    "solved": self.solved(position),
                    "rank": asdict(self.ranks[position]),
                    "evaluations_saved": None if saved is None else asdict(saved),
                }
                for position, (spec, saved) in enumerate(zip(self.specs, self.saved, strict=True))
            ],
            "winner": self.winner,
        }

    def figure(self, name: str = "profile") -> Any:
        """Return the performance profile as a matplotlib Figure. Raises ProblemError."""
        from metaopt.lab.profile_figure import profile

        if name != "profile":
            raise ProblemError(f"a figure over problems must be profile, got {name!r}")
        return profile(self)

    def save(self, figures: Sequence[str] = ("png",)) -> list[Path]:
        """Write the table, its numbers and the profile below names of their own; return the files. Raises LogError."""
        from metaopt.lab.figures import check_forms
        from metaopt.lab.profile_figure import picture

        check_forms(figures)
        named = digest(
            [[str(c.folder), c.plan.specs, c.plan.looks, c.plan.budget, c.plan.trials] for c in self.comparisons]
        )
        name = f"overview-{named[:8]}"
        written = [self.out / f"{name}.md", self.out / f"{name}.json"]
        with held(self.out, "an overview"):
            write_text(written[0], str(self))
            write_text(written[1], json.dumps(self.to_dict(), indent=1) + "\n")
            for form in figures:
                written.append(self.out / f"{name}-profile.{form}")
                write_bytes(written[-1], picture(self.figure(), form))
        return written

    def rows(self) -> list[dict[str, str]]:
        """Return the table over problems: one row per contender, every cell as text."""
        found = []
        for position, (spec, saved) in enumerate(zip(self.specs, self.saved, strict=True)):
            row = {
                "stack": spec,
                "score [95%]": _text(self.scores[position]),
                "solved": f"{self.solved(position)} of {len(self.comparisons)}",
                "mean rank [95%]": _text(self.ranks[position]),
                "evaluations saved [95%]": "" if saved is None else _text(saved, percent=True),
            }
            found.append(row)
        return found

    def remarks(self) -> list[str]:
        """Return what has to be said beside the table."""
        missed = [
            problem
            for problem, times in zip(self.problems, self.times, strict=True)
            if not np.isfinite(np.median(times, axis=1)).any()
        ]
        most, named = f"{profiles.MOST:g}", f"Soonest on these {len(self.comparisons)} problems: {self.winner}. "
        return [
            "No overall winner: no contender's score exceeds every other's by more than the studies scatter."
            if self.winner is None
            else f"{named}Its score exceeds every other's, with an interval without zero and p <= 0.05 if the "
            "labels of paired studies are exchanged. Nothing is said about other problems.",
            "Score: the area under the performance profile, the share of problems on which the median study met the "
            f"target within tau times the best's evaluations, for tau from 1 to {most} (arXiv:2306.07179). A missed "
            "target is never within. Intervals are over studies; the problems are what they are.",
            "Mean rank: by test loss within a study, over studies and problems; 1 is the best. Evaluations saved: by "
            "which share of the budget it has the baseline's final validation loss earlier; negative if the baseline "
            "does.",
            *([f"Nobody met the target of {', '.join(missed)}: not solved, for all of them."] if missed else []),
        ]

    def __str__(self) -> str:
        """Return the report as Markdown: the verdicts of each problem, then the numbers over all."""
        tables = [verdict_rows(comparison) for comparison in self.comparisons]
        verdicts = [
            {"stack": spec, **{p: _cell(table[position]) for p, table in zip(self.problems, tables, strict=True)}}
            for position, spec in enumerate(self.specs)
        ]
        return "\n".join(
            [
                f"# {len(self.comparisons)} problems",
                "",
                *as_table(self.rows()),
                "",
                *(f"- {remark}" for remark in self.remarks()),
                "",
                "## Problem by problem",
                "",
                *as_table(verdicts),
                "",
                "Each verdict is that of its own problem, with a level of its own.",
                "",
            ]
        )


def _shares(contender: Contender, baseline: Contender, budget: int) -> profiles.Numbers:
    return np.array(evaluations_saved_by_study(contender.runs, baseline.runs)) / budget


def _text(estimate: Estimate, percent: bool = False) -> str:
    if percent:
        return f"{estimate.value:+.0%} [{estimate.low:+.0%}, {estimate.high:+.0%}]"
    return (
        f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]" if math.isfinite(estimate.value) else "none"
    )


def _cell(row: dict[str, str]) -> str:
    time = row.get("time to target", "")
    return f"{row['test loss']}; {row['verdict']}" + (f"; target {time.partition(':')[0]}" if time else "")
