"""`python -m benchmarks.recompute FOLDER ...`: the numbers of a comparison from its trials.csv, without metaopt.

Everything is computed anew with scipy and numpy from the table of trials, by the definitions in
docs/guides/comparing.md, and held against results.json, to six digits, and the table of report.md, letter by letter. A
folder of several problems has each of them below it, and an overview: its scores, ranks and evaluations saved as well.
"""

import argparse
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.recompute_one import of_comparison
from benchmarks.recompute_overall import of_problems

SIX_DIGITS = 1e-6


def disagreements(folder: Path) -> Iterator[str]:
    """Yield where results.json or report.md of a comparison say something else than its table of trials."""
    written = json.loads((folder / "results.json").read_text())
    found = of_comparison(folder, written["level"])
    cells = {row["stack"]: row for row in _table((folder / "report.md").read_text())}
    for contender in written["contenders"]:
        spec = contender["spec"]
        own = found[spec]
        for name in ("losses", "reached", "verdict", "target_verdict", "evaluations_saved"):
            yield from differing(f"{spec}: {name}", own[name], contender[name])
        for name, cell in own["cells"].items():
            # in front of the numbers there may be a word, and behind them that the range was too small
            told = cells[spec].get(name, "").removesuffix(" (edge)")
            if told != cell and not told.endswith(f": {cell}"):
                yield f"{spec}: {name} is {told!r} in the report, {cell!r} from the trials"


def disagreements_over_all(folder: Path) -> Iterator[str]:
    """Yield where an overview of several problems says something else than their tables of trials."""
    for path in folder.glob("overview-*.json"):
        written = json.loads(path.read_text())
        below = {json.loads(each.read_text())["problem"]: each.parent for each in folder.glob("*/results.json")}
        found = of_problems([of_comparison(below[problem]) for problem in written["problems"]])
        yield from differing(path.name, found, {name: written[name] for name in ("contenders", "winner")})


def differing(what: str, mine: Any, written: Any) -> Iterator[str]:
    """Yield where two numbers, or the numbers in two values, differ in the first six digits."""
    if isinstance(mine, Mapping) and isinstance(written, Mapping) and mine.keys() == written.keys():
        for name in mine:
            yield from differing(f"{what}.{name}", mine[name], written[name])
    elif isinstance(mine, list) and isinstance(written, list) and len(mine) == len(written):
        for number, (a, b) in enumerate(zip(mine, written, strict=True)):
            yield from differing(f"{what}[{number}]", a, b)
    elif isinstance(mine, float | int) and isinstance(written, float | int | str):
        a, b = float(mine), float(written)
        # near zero what is left of numbers of ordinary size
        if not (a == b or (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=SIX_DIGITS, abs_tol=1e-12)):
            yield f"{what} is {written}, {mine} from the trials"
    elif mine != written:
        yield f"{what} is {written!r}, {mine!r} from the trials"


def _table(report: str) -> list[dict[str, str]]:
    """Return the rows of the first table of a report in Markdown."""
    lines = report.splitlines()[2:]
    rows = [line for line in lines[: lines.index("")] if line.startswith("| ")]
    head, *body = [[c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in rows]
    return [dict(zip(head, row, strict=True)) for row in body]


def main() -> None:
    """Print every number that differs; end with 1 if there is one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recompute", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="+", help="where `metaopt compare` has written")
    found = []
    for folder in parser.parse_args().folder:
        below = sorted(path.parent for path in folder.glob("**/results.json"))
        found += [f"{each}: {told}" for each in below for told in disagreements(each)]
        found += [f"{folder}: {told}" for told in disagreements_over_all(folder)]
        print(f"{folder}: {len(below)} comparisons recomputed")
    print("\n".join(found) or "all numbers are equal to six digits")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
