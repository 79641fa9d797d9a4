"""What was measured, as tables of text and as JSON."""

import datetime
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.measure import Row, SetResult
from benchmarks.targets import Verdict
from benchmarks.training_step import TOKENS, share
from metaopt.lab.timing import Spread

FEWEST_ROUNDS = 20

Table = list[dict[str, str]]


def set_table(result: SetResult, on_cpu: bool, pass_: Spread | None = None) -> Table:
    """Return one shape set as rows of text, one per contender."""
    return [_cells(row, result, on_cpu, pass_) for row in result.rows]


def _cells(row: Row, result: SetResult, on_cpu: bool, pass_: Spread | None) -> dict[str, str]:
    cells = {
        "contender": row.key,
        "what": row.what,
        "ms per update": f"{row.seconds.median * 1e3:.3f}",
        f"against {result.baseline}": f"{row.ratio.median:.3f} [{row.ratio.low:.3f}, {row.ratio.high:.3f}]",
    }
    if not on_cpu:
        cells["ms until the call returns"] = f"{row.host_seconds.median * 1e3:.3f}"
        cells["kernel launches"] = f"{row.launches:.1f}"
    if pass_ is not None:
        cells["share of a step"] = f"{share(row.seconds.median, pass_.median):.1%}"
    cells["state"] = _size(row.state_bytes, result.parameter_bytes)
    cells["temporary"] = _size(row.temporary_bytes, result.parameter_bytes)
    cells["bytes at least"] = _size(row.least_bytes, result.parameter_bytes)
    cells["of the bandwidth"] = f"{row.of_bandwidth:.0%}"
    return cells


def _size(count: float, parameters: int) -> str:
    return f"{count / 1e6:.2f} MB ({count / parameters:.2f}x)"


def set_heading(result: SetResult) -> str:
    """Return what holds for a whole table, in one line."""
    return (
        f"{result.name}: {result.tensors:,} tensors, {result.elements:,} elements; {result.rounds} interleaved rounds, "
        f"median [quartiles]; {result.bandwidth.median / 1e9:.1f} GB/s measured in the same rounds"
    )


def remarks(results: Sequence[SetResult], notes: Sequence[str], pass_: Spread | None, rounds: int) -> list[str]:
    """Return what a reader must know to read the tables."""
    said = list(notes)
    if results:
        said.append("sizes also as multiples of the parameters; bytes at least: what the update must read and write")
    if pass_ is not None:
        said.append(
            f"share of a step: with a forward and backward pass of the transformer over {TOKENS} tokens, "
            f"{pass_.median * 1e3:.0f} ms"
        )
    if rounds < FEWEST_ROUNDS:
        said.append(f"fewer than {FEWEST_ROUNDS} rounds: a rough look, no measurement")
    for result in results:
        diverged = [row.key for row in result.rows if not row.finite]
        if diverged:
            said.append(
                f"{result.name}: the weights of {', '.join(diverged)} are not finite, so its times mean nothing"
            )
    return said


def target_table(verdicts: Sequence[Verdict]) -> Table:
    """Return the targets as rows of text."""
    return [
        {
            "target": verdict.target,
            "what": verdict.what,
            "where": verdict.where,
            "measured": "-" if verdict.measured is None else f"{verdict.measured:.3f} {verdict.unit}",
            "at most": f"{verdict.at_most:g} {verdict.unit}",
            "": {True: "met", False: "MISSED", None: "not measured"}[verdict.met],
            "remark": verdict.remark,
        }
        for verdict in verdicts
    ]


def markdown(table: Table) -> str:
    """Return a table as Markdown."""
    head = list(table[0])
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(row[name].replace("|", "\\|") for name in head) + " |" for row in table]
    return "\n".join(lines)


def document(
    machine: dict[str, str | int],
    dtype: str,
    results: Sequence[SetResult],
    notes: Sequence[str],
    pass_: Spread | None,
    verdicts: Sequence[Verdict],
) -> dict[str, Any]:
    """Return everything that was measured, for `--json`: seconds, bytes and ratios, nothing rounded."""
    return {
        "format": 1,
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "dtype": dtype,
        "sets": {result.name: _set_document(result, pass_) for result in results},
        "training_step": None if pass_ is None else {"tokens": TOKENS, "seconds": asdict(pass_)},
        "targets": [asdict(verdict) for verdict in verdicts],
        "notes": list(notes),
    }


def _set_document(result: SetResult, pass_: Spread | None) -> dict[str, Any]:
    found = asdict(result)
    found["contenders"] = found.pop("rows")
    for row in found["contenders"]:
        in_step = pass_ is not None and result.name == "transformer"
        row["share_of_step"] = share(row["seconds"]["median"], pass_.median) if in_step and pass_ else None
    return found
