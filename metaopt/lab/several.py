"""Comparisons on several problems: a folder for each."""

import re
from collections.abc import Sequence
from pathlib import Path

from metaopt.errors import ProblemError


def folders(problems: Sequence[str], out: Path) -> dict[str, Path]:
    """Return where each problem's comparison goes: into `out` if it is the only one, else into a folder below it."""
    if len(problems) == 1:
        return {problems[0]: out}
    found = {problem: out / re.sub(r"[^A-Za-z0-9_.]+", "-", problem).strip("-.") for problem in problems}
    if len(set(found.values())) < len(problems):
        raise ProblemError("each --problem must be given once, got one of them twice")
    return found
