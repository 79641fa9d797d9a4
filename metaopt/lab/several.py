"""Comparisons on several problems: a folder for each, and one table over all."""

import re
from collections.abc import Sequence
from pathlib import Path

from metaopt.errors import ProblemError
from metaopt.lab.circumstances import digest
from metaopt.lab.comparison import Comparison
from metaopt.lab.holding import held, write_text
from metaopt.lab.report import rows


def folders(problems: Sequence[str], out: Path) -> dict[str, Path]:
    """Return where each problem's comparison goes: into `out` if it is the only one, else into a folder below it."""
    if len(problems) == 1:
        return {problems[0]: out}
    found = {problem: out / re.sub(r"[^A-Za-z0-9_.]+", "-", problem).strip("-.") for problem in problems}
    if len(set(found.values())) < len(problems):
        raise ProblemError("each --problem must be given once, got one of them twice")
    return found


def write_overview(comparisons: Sequence[Comparison], out: Path) -> Path:
    """Write the verdicts of all problems into a file whose name belongs to these comparisons. Raises LogError."""
    named = digest([[str(c.folder), c.plan.specs, c.plan.looks, c.plan.budget, c.plan.trials] for c in comparisons])
    path = out / f"overview-{named[:8]}.md"
    with held(out, "an overview"):
        write_text(path, overview(comparisons))
    return path


def overview(comparisons: Sequence[Comparison]) -> str:
    """Return a table of verdicts, a row per contender and a column per problem, as Markdown."""
    tables = [rows(comparison) for comparison in comparisons]
    lines = [f"# {len(comparisons)} problems", ""]
    lines.append("| stack | " + " | ".join(comparison.plan.problem for comparison in comparisons) + " |")
    lines.append("|" + " --- |" * (len(comparisons) + 1))
    for position, first in enumerate(tables[0]):
        cells = [_cell(table[position]) for table in tables]
        stack = first["stack"].replace("|", "\\|")
        lines.append(f"| {stack} | {' | '.join(cells)} |")
    lines += [
        "",
        "Each verdict is that of its own problem, with a level of its own; no winner over problems is named.",
        "",
    ]
    return "\n".join(lines)


def _cell(row: dict[str, str]) -> str:
    time = row.get("time to target", "")
    return f"{row['test loss']}; {row['verdict']}" + (f"; target {time.partition(':')[0]}" if time else "")
