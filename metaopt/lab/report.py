"""What a comparison writes: results.json, report.md and the same table for the terminal."""

import json
import math
import platform
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from metaopt import __version__
from metaopt.lab.compare import Contender, Plan
from metaopt.lab.statistics import fewest_seeds
from metaopt.registry import registry


def rows(plan: Plan, contenders: list[Contender]) -> list[dict[str, str]]:
    """Return the table: one row per contender, every cell as text."""
    table = []
    for position, contender in enumerate(contenders):
        finite = [loss for loss in contender.losses if math.isfinite(loss)]
        reached = [run["reached"] for run in contender.runs if run["reached"] is not None]
        runs = len(contender.runs)
        row = {
            "stack": contender.spec,
            "lr": "as given"
            if contender.rate is None
            else f"{contender.rate:.3g}{' (edge)' if contender.at_edge else ''}",
            "weights": str(contender.runs[0]["weights"]),
            "test loss": f"{mean(finite):.4f}" if finite else "diverged",
            "diverged": str(runs - len(finite)),
            "target": f"{len(reached)} of {runs}" + (f", median {median(reached):g}" if reached else ""),
            "evaluations": str(contender.runs[0]["evaluations"]),
            "updates": str(contender.runs[0]["updates"]),
            "difference (95%)": "baseline" if position == plan.baseline else _difference(contender),
            "p (Holm)": "" if contender.verdict is None else f"{contender.verdict.corrected_p:.3g}",
            "verdict": _word(plan, contender),
        }
        if plan.jobs == 1:
            row["seconds"] = f"{median(run['seconds'] for run in contender.runs):.2f}"
        table.append(row)
    return table


def _difference(contender: Contender) -> str:
    v = contender.verdict
    return "" if v is None or math.isnan(v.difference) else f"{v.difference:+.4f} [{v.low:+.4f}, {v.high:+.4f}]"


def _word(plan: Plan, contender: Contender) -> str:
    verdict = contender.verdict
    if verdict is None:
        return ""
    if not plan.tune:
        return "settings differ" if verdict.word in ("better", "worse") else verdict.word
    if verdict.word == "no difference shown":
        return f"no difference shown (this run could have shown {verdict.smallest:.4f})"
    return verdict.word


def remarks(plan: Plan, contenders: list[Contender]) -> list[str]:
    """Return what has to be said beside the table."""
    others = len(contenders) - 1
    said = [
        f"A verdict needs at least {fewest_seeds(others)} seeds with {others} contenders; this run has {plan.seeds}."
    ]
    said += [
        f"Grid too small: the best rate of {contender.spec} is at the edge, {contender.rate:.3g}; widen it."
        for contender in contenders
        if contender.at_edge and contender.rate is not None
    ]
    if not plan.tune:
        said.append("Fixed rates rank settings, not optimizers: no winner is named.")
    return said


def write_results(plan: Plan, contenders: list[Contender]) -> None:
    """Write results.json and report.md into the comparison's folder, each whole or not at all."""
    problem = registry.find(plan.problem, "problem").target()
    results: dict[str, Any] = {
        "problem": plan.problem,
        "data": problem.data_hash(),
        "targets": problem.targets,
        "plan": {**asdict(plan), "out": str(plan.out)},
        "versions": {"metaopt": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads() if plan.jobs == 1 else 1,
        "device": plan.device,
        "contenders": [{**asdict(contender), "losses": contender.losses} for contender in contenders],
    }
    _write(plan.out / "results.json", json.dumps(_plain(results), indent=1) + "\n")
    _write(plan.out / "report.md", markdown(plan, contenders))


def markdown(plan: Plan, contenders: list[Contender]) -> str:
    """Return the report as Markdown."""
    table = rows(plan, contenders)
    head = list(table[0])
    lines = [f"# {plan.problem}: {len(contenders)} contenders, {plan.seeds} seeds, {plan.steps} updates", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(row[name].replace("|", "\\|") for name in head) + " |" for row in table]
    lines += ["", *(f"- {remark}" for remark in remarks(plan, contenders)), ""]
    lines += ["![loss against gradient evaluations](curves.png)", ""]
    if plan.tune:
        lines += ["![final loss against learning rate](sensitivity.png)", ""]
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    """Return a value with text in place of numbers that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _write(path: Path, text: str) -> None:
    scratch = path.with_suffix(path.suffix + ".tmp")
    scratch.write_text(text)
    scratch.replace(path)
