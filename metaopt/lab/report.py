"""What a comparison writes: results.json, report.md and the same table for the terminal."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any

from metaopt.errors import LogError
from metaopt.lab.compare import Contender
from metaopt.lab.holding import scratch_of
from metaopt.lab.named import problem_named
from metaopt.lab.plan import Plan, expanded, given_rate
from metaopt.lab.statistics import DRAWS, EXACT_UP_TO, LEVEL, fewest_seeds


def rows(plan: Plan, contenders: list[Contender]) -> list[dict[str, str]]:
    """Return the table: one row per contender, every cell as text."""
    timed = all(run["jobs"] == 1 for contender in contenders for run in contender.runs)
    baseline = contenders[plan.baseline]
    return [_row(plan, contender, baseline, timed) for contender in contenders]


def _row(plan: Plan, contender: Contender, baseline: Contender, timed: bool) -> dict[str, str]:
    runs = contender.runs
    row = {
        "stack": contender.spec,
        "lr": "as given" if contender.rate is None else f"{contender.rate:.3g}{' (edge)' if contender.at_edge else ''}",
        "weights": str(runs[0]["weights"]),
        "test loss": _loss(contender),
        "diverged": f"{contender.diverged} of {len(runs)}",
        "target reached": _reached([run["reached"] for run in runs]),
        "evaluations": str(max(run["evaluations"] for run in runs)),
        "updates": str(max(run["updates"] for run in runs)),
        "difference [95%]": _difference(contender),
        "p (Holm)": "" if contender.verdict is None else f"{contender.verdict.corrected_p:.3g}",
        "verdict": _word(plan, contender, baseline),
        "could have shown": _smallest(contender),
    }
    if timed:
        row["seconds"] = f"{median(run['seconds'] for run in runs):.2f}"
    return row


def _loss(contender: Contender) -> str:
    """Return the mean over seeds; where runs diverged the median, which counts them as the largest."""
    if not contender.diverged:
        return f"{mean(contender.losses):.4f}"
    middle = median(contender.losses)
    return f"median {middle:.4f}" if math.isfinite(middle) else "diverged"


def _reached(reached: list[int | None]) -> str:
    """Return how many runs met the target, and the median over all runs: one that missed it took longer than any."""
    met = sum(at is not None for at in reached)
    middle = median(math.inf if at is None else at for at in reached)
    return f"{met} of {len(reached)}" + (f", median {middle:g}" if math.isfinite(middle) else "")


def _difference(contender: Contender) -> str:
    v = contender.verdict
    return "" if v is None else f"{v.difference:+.4f} [{v.low:+.4f}, {v.high:+.4f}]"


def _word(plan: Plan, contender: Contender, baseline: Contender) -> str:
    verdict = contender.verdict
    if verdict is None:
        return "baseline"
    word = verdict.word
    if not plan.tune and word in ("better", "worse"):
        word = "settings differ"
    beaten = {"better": baseline, "worse": contender}.get(word)
    if beaten is not None and beaten.at_edge:
        word = f"{word} on a grid too small for {'the baseline' if beaten is baseline else 'it'}"
    return f"{word} (by ranks)" if verdict.by_ranks else word


def _smallest(contender: Contender) -> str:
    """Return the least difference that runs spread like these show."""
    verdict = contender.verdict
    if verdict is None or verdict.by_ranks:
        return ""
    return f"{verdict.smallest:.4f}" if math.isfinite(verdict.smallest) else "none"


def remarks(plan: Plan, contenders: list[Contender]) -> list[str]:
    """Return what has to be said beside the table."""
    others = len(contenders) - 1
    least = fewest_seeds(others)
    said = [
        f"A verdict takes a 95% interval without zero and p <= {LEVEL:g} after Holm's correction for {others} "
        f"contender{'s' if others > 1 else ''}: at least {least} seeds; this run has {plan.seeds}"
        + (", so no difference of any size could be shown." if plan.seeds < least else ".")
    ]
    if plan.seeds > EXACT_UP_TO:
        said.append(f"p is of {DRAWS:,} random choices of signs, not of all 2^{plan.seeds}.")
    said.append("Could have shown: the smallest difference in loss that runs spread like these make a verdict of.")
    said += _targets(plan)
    said += [
        f"{contender.diverged} of {plan.seeds} runs of {contender.spec} diverged: they count as the worst, by ranks."
        for contender in contenders
        if contender.diverged
    ]
    said += [
        f"Grid too small: the best rate of {contender.spec} is at the edge, {contender.rate:.3g}; "
        f"widen it with {'--lr-min' if contender.rate == plan.rates[0] else '--lr-max'}."
        for contender in contenders
        if contender.at_edge and contender.rate is not None
    ]
    said += [
        f"The grid replaces lr={given_rate(spec):g} of {spec}; --no-tune keeps it."
        for spec in plan.specs
        if plan.tune and given_rate(spec) is not None
    ]
    if not plan.tune:
        said.append("Fixed rates rank settings, not optimizers: no winner is named.")
    said.append("Every run had one thread; times are shown where all runs were made with --jobs 1, one at a time.")
    return said


def _targets(plan: Plan) -> list[str]:
    targets = problem_named(plan.problem).targets
    metric, goal = next(iter(targets.items()), (None, None))
    if metric is None:
        return []
    sign = "<=" if metric == "loss" else ">="
    return [
        f"Target, fixed beforehand: {metric} {sign} {goal:g} on validation data. Counted in gradient evaluations; "
        f"a run that misses it is censored, as longer than any other."
    ]


def write_results(plan: Plan, contenders: list[Contender]) -> None:
    """Write results.json and report.md into the comparison's folder, each whole or not at all. Raises LogError."""
    shown = {**asdict(plan), "out": str(plan.out)}
    results: dict[str, Any] = {
        "problem": plan.problem,
        **plan.circumstances,
        "targets": problem_named(plan.problem).targets,
        "plan": {key: value for key, value in shown.items() if key != "circumstances"},
        "fewest_seeds": fewest_seeds(len(contenders) - 1),
        "contenders": [_contender(contender) for contender in contenders],
    }
    _write(plan.out / "results.json", json.dumps(_plain(results), indent=1) + "\n")
    _write(plan.out / "report.md", markdown(plan, contenders))


def _contender(contender: Contender) -> dict[str, Any]:
    return {**asdict(contender), "expanded": expanded(contender.trained), "losses": contender.losses}


def markdown(plan: Plan, contenders: list[Contender]) -> str:
    """Return the report as Markdown."""
    table = rows(plan, contenders)
    head = list(table[0])
    lines = [f"# {headline(plan, contenders)}", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(row[name].replace("|", "\\|") for name in head) + " |" for row in table]
    lines += ["", *(f"- {remark}" for remark in remarks(plan, contenders)), ""]
    lines += ["![validation loss against gradient evaluations](curves.png)", ""]
    if plan.tune:
        lines += ["![validation loss against learning rate](sensitivity.png)", ""]
    return "\n".join(lines)


def headline(plan: Plan, contenders: list[Contender]) -> str:
    """Return what was compared, in one line."""
    return f"{plan.problem}: {len(contenders)} contenders, {plan.seeds} seeds, {plan.budget} gradient evaluations"


def _plain(value: Any) -> Any:
    """Return a value with text in place of numbers that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _write(path: Path, text: str) -> None:
    scratch = scratch_of(path)
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        raise LogError(f"{path} cannot be written: {error.strerror or error}") from None
