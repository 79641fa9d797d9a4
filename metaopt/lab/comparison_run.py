"""The TensorBoard run of a comparison as a whole: the report, the verdicts, the pictures and the charts of its page."""

import json
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from metaopt.errors import LogError
from metaopt.lab import sensitivity
from metaopt.lab.comparison import Comparison
from metaopt.lab.report import headline, remarks, rows, word_of
from metaopt.lab.results import plain
from metaopt.lab.runs import charts, names
from metaopt.logger import Logger, Table
from metaopt.registry import registry

NAME = "comparison"
FINAL = "test/loss"
# the tag of the verdicts, which the tab "Stack" draws
VERDICTS = "metaopt/verdicts"


def write_run(comparison: Comparison, pictures: Mapping[str, bytes]) -> None:
    """Write the run beside those of the contenders, in place of an earlier one; `pictures` are PNGs by their names.

    Raises LogError.
    """
    from torch.utils.tensorboard import SummaryWriter

    folder = comparison.folder / "tensorboard" / NAME
    try:
        shutil.rmtree(folder, ignore_errors=True)
        with SummaryWriter(str(folder)) as writer:
            # never opened: this run has no stack, and no row among those of the page "HParams"
            logger: Logger = registry.find("tensorboard", "logger").target(writer)
            verdicts = json.dumps(plain(verdict_table(comparison)))
            logger.texts(0, {"metaopt/report": report(comparison), VERDICTS: verdicts})
            logger.images(0, {f"metaopt/{name}": png for name, png in pictures.items()})
            logger.layout(charts(comparison.contenders))
    except OSError as error:
        raise LogError(f"cannot write to {folder}: {error.strerror or error}") from error


def report(comparison: Comparison) -> str:
    """Return the report as Markdown with a column per contender, the answer first: the page "Text" is narrow."""
    table = rows(comparison)
    first = [name for name in ("stack", "verdict", "difference [95%]", "p (Holm)") if name in table[0]]
    order = [*first, *(name for name in table[0] if name not in first)]
    said = _upright(comparison, table, order, remarks(comparison))
    return f"**{headline(comparison)}**\n\n{said}{_sensitivity(comparison)}"


def _sensitivity(comparison: Comparison) -> str:
    table = sensitivity.rows(comparison)
    if not table:
        return ""
    order = [name for name in table[0] if name != "stack"]
    return "\n" + _upright(comparison, table, order, sensitivity.remarks(comparison))


def _upright(
    comparison: Comparison, table: Sequence[Mapping[str, str]], order: Sequence[str], said: Sequence[str]
) -> str:
    """Return a table with a column per contender, as Markdown, with what has to be said below it."""
    columns = ("", *names(comparison.plan.specs))
    upright = Table(columns, tuple((name, *(row[name] for row in table)) for name in order))
    return "\n".join([f"{upright.markdown()}\n", *(f"- {remark}" for remark in said), ""])


def verdict_table(comparison: Comparison) -> dict[str, Any]:
    """Return the verdicts of all contenders, which the tab "Stack" of TensorBoard draws."""
    rows = []
    for contender in comparison.contenders:
        found, word = contender.verdict, word_of(comparison, contender)
        numbers = ("difference", "low", "high")
        row = {"contender": contender.spec, "p": None, **dict.fromkeys(numbers), "verdict": word}
        if found is not None:
            row |= {name: getattr(found, name) for name in numbers}
            row["p"] = found.corrected_p
        rows.append(row)
    return {"baseline": comparison.baseline.spec, "metric": FINAL, "level": comparison.level, "rows": rows}
