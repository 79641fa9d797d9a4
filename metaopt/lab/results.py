"""A comparison as data: results.json, trials.csv and the rows that both are made of."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metaopt.lab.comparison import Comparison, Contender
from metaopt.lab.holding import write_text
from metaopt.lab.named import problem_named
from metaopt.lab.plan import expanded
from metaopt.lab.power import fewest_studies
from metaopt.lab.report import markdown
from metaopt.lab.savings import evaluations_saved
from metaopt.lab.sensitivity import numbers


def write_results(comparison: Comparison, folder: Path | None = None) -> list[Path]:
    """Write results.json, trials.csv and report.md into the comparison's folder, each whole or not at all."""
    written = {
        "results.json": json.dumps(document(comparison), indent=1) + "\n",
        "trials.csv": trials_csv(comparison),
        "report.md": markdown(comparison),
    }
    if comparison.at_sizes:
        written["batch_sizes.csv"] = _text(size_rows(comparison))
    paths = {(folder or comparison.folder) / name: text for name, text in written.items()}
    for path, text in paths.items():
        write_text(path, text)
    return list(paths)


def document(comparison: Comparison) -> dict[str, Any]:
    """Return everything that a comparison found, as plain values that JSON has; infinite numbers as text."""
    plan = comparison.plan
    shown = {key: value for key, value in asdict(plan).items() if key not in ("circumstances", "own", "at_sizes")}
    found = {
        "problem": plan.problem,
        **plan.circumstances,
        "targets": problem_named(plan.problem).targets,
        "plan": {**shown, "out": str(plan.out)},
        "studies": comparison.studies,
        "level": comparison.level,
        "earlier_looks": comparison.earlier,
        "fewest_studies": fewest_studies(len(comparison.contenders) - 1, comparison.level),
        "contenders": [_contender(contender, comparison.baseline) for contender in comparison.contenders],
        "sensitivity": numbers(comparison),
    }
    written: dict[str, Any] = plain(found)
    return written


def _contender(contender: Contender, baseline: Contender) -> dict[str, Any]:
    return {
        "spec": contender.spec,
        "edge": contender.edge,
        "verdict": None if contender.verdict is None else asdict(contender.verdict),
        "target_verdict": None if contender.target_verdict is None else asdict(contender.target_verdict),
        "losses": contender.losses,
        "reached": contender.reached,
        "rates": [study.rate for study in contender.studies],
        "evaluations_saved": None if contender is baseline else evaluations_saved(contender.runs, baseline.runs),
        "expanded": [expanded(run["spec"]) for run in contender.runs],
        "runs": contender.runs,
    }


def trial_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Return a row per trial, of all contenders and studies; infinite where a trial diverged."""
    return _rows(comparison.plan.problem, comparison.contenders, comparison.plan.baseline)


def size_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the same rows for the trials with other batch sizes."""
    return [
        {"batch_size": size, **row}
        for size, (plan, contenders) in comparison.at_sizes.items()
        for row in _rows(plan.problem, contenders, plan.baseline)
    ]


def _rows(problem: str, contenders: Sequence[Contender], baseline: int) -> list[dict[str, Any]]:
    found = []
    for position, contender in enumerate(contenders):
        for study in contender.studies:
            for rate, trial, best in study.by_rate():
                found.append(
                    {
                        "problem": problem,
                        "contender": contender.spec,
                        "baseline": position == baseline,
                        "study": study.number,
                        "lr": math.nan if rate is None else rate,
                        "spec": trial["spec"],
                        "chosen": best,
                        "seed": trial["seed"],
                        **{f"validation_{name}": _lost(value, name) for name, value in trial["validation"].items()},
                        **{f"test_{name}": _lost(value, name) for name, value in trial["test"].items()},
                        "reached": math.inf if trial["reached"] is None else float(trial["reached"]),
                        "diverged": trial["diverged"],
                        "failed": trial["failed"] or "",
                        "evaluations": trial["evaluations"],
                        "updates": trial["updates"],
                        "budget": trial["budget"],
                        "seconds": trial["seconds"],
                        "jobs": trial["jobs"],
                        "weights": trial["weights"],
                        **{f"{name}_bytes": trial["memory"][name] for name in ("parameters", "state", "peak")},
                        # validation loss by evaluations, null where it was not finite
                        "curve": json.dumps(trial["curve"], separators=(",", ":")),
                    }
                )
    return found


def trials_csv(comparison: Comparison) -> str:
    """Return the rows of all trials as a table of text."""
    return _text(trial_rows(comparison))


def _text(rows: Sequence[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _lost(value: float | None, name: str) -> float:
    if value is not None:
        return value
    return math.inf if name.endswith("loss") else math.nan


def plain(value: Any) -> Any:
    """Return a value with text in place of numbers that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
