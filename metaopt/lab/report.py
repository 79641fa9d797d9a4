"""What a comparison says in words: a table with a row per contender, remarks beside it, and both as Markdown."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any

from metaopt.lab import sensitivity
from metaopt.lab.bands import quartiles
from metaopt.lab.comparison import Comparison, Contender
from metaopt.lab.looks import FALLS_BY, pocock
from metaopt.lab.named import problem_named
from metaopt.lab.power import detectable, fewest_studies
from metaopt.lab.rates import given_rate
from metaopt.lab.savings import evaluations_saved
from metaopt.lab.settings import found_in, searches
from metaopt.lab.statistics import LEVEL, Verdict, paired_differences

NONE_SHOWN = "no difference shown"


def rows(comparison: Comparison) -> list[dict[str, str]]:
    """Return the table: one row per contender, every cell as text; a column that no row fills is left out."""
    timed = all(run["jobs"] == 1 for contender in comparison.contenders for run in contender.runs)
    table = [_row(comparison, contender, timed) for contender in comparison.contenders]
    return [{name: cell for name, cell in row.items() if any(other[name] for other in table)} for row in table]


def _row(comparison: Comparison, contender: Contender, timed: bool) -> dict[str, str]:
    runs, verdict, baseline = contender.runs, contender.verdict, comparison.baseline
    metrics = dict.fromkeys(name for run in _of_all(comparison) for name in run["test"] if name != "loss")
    return {
        "stack": contender.spec,
        "lr": _rate(contender),
        "weights": str(runs[0]["weights"]),
        "test loss": _spread(contender.losses),
        **{name: _spread([_number(run["test"].get(name), -math.inf) for run in runs]) for name in metrics},
        "difference [95%]": _difference(verdict),
        "p (Holm)": "" if verdict is None else f"{verdict.corrected_p:.3g}",
        "verdict": word_of(comparison, contender),
        "better in": "" if verdict is None else f"{100 * verdict.superiority:.0f}% of studies",
        "evaluations saved": "" if verdict is None else f"{evaluations_saved(runs, baseline.runs):+.0f}",
        "target reached": _reached(contender.reached),
        "time to target": _time(comparison, contender),
        "diverged": _diverged(contender),
        "evaluations": str(max(run["evaluations"] for run in runs)),
        "updates": str(max(run["updates"] for run in runs)),
        "could have shown": _detectable(comparison, contender),
        "seconds": f"{median(run['seconds'] for run in runs):.2f}" if timed else "",
        "ms per update": f"{1e3 * median(_pace(run) for run in runs):.2f}" if timed else "",
        "state": _state(runs),
    }


def _pace(run: Mapping[str, Any]) -> float:
    """Return the seconds of an update; infinite for a run that made none."""
    return run["seconds"] / run["updates"] if run["updates"] else math.inf


def _state(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return what the optimizer keeps, in sizes of the parameters, and on an accelerator the most memory in use."""
    memory = next((run["memory"] for run in runs if run["memory"]["parameters"]), None)
    if memory is None:
        return ""
    peak = "" if memory["peak"] is None else f", peak {memory['peak'] / 2**20:.0f} MiB"
    return f"{memory['state'] / memory['parameters']:.2f} x parameters{peak}"


def _of_all(comparison: Comparison) -> list[dict[str, dict[str, float]]]:
    return [run for contender in comparison.contenders for run in contender.runs]


def _number(value: float | None, lost: float) -> float:
    return lost if value is None else float(value)


def _rate(contender: Contender) -> str:
    rates = [study.rate for study in contender.studies if study.rate is not None]
    if not rates:
        return "as given"
    edge = " (edge)" if contender.edge else ""
    return f"{median(rates):.3g} ({min(rates):.3g} to {max(rates):.3g}){edge}"


def _spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation over studies; where some diverged median and quartiles, which count them."""
    if all(map(math.isfinite, values)):
        return f"{mean(values):.4f} ± {stdev(values):.4f}"
    low, middle, high = map(float, quartiles(values))
    return f"median {middle:.4f} [{low:.4f}, {high:.4f}]" if math.isfinite(middle) else "diverged"


def _reached(reached: Sequence[float]) -> str:
    """Return how many studies met the target, and the median over all: one that missed it took longer than any."""
    met = sum(map(math.isfinite, reached))
    middle = median(reached)
    return f"{met} of {len(reached)}" + (f", median {middle:g}" if math.isfinite(middle) else "")


def _diverged(contender: Contender) -> str:
    trials = contender.trials
    lost = sum(trial["diverged"] for trial in trials)
    failed = sum(trial["failed"] is not None for trial in trials)
    said = f"{lost} of {len(trials)} trials" + (f", {failed} of them failed" if failed else "")
    whole = sum(map(math.isinf, contender.losses))
    return (
        f"{said}; {whole} of {len(contender.studies)} studies" if whole and len(trials) > len(contender.runs) else said
    )


def _difference(verdict: Verdict | None) -> str:
    return "" if verdict is None else f"{verdict.difference:+.4f} [{verdict.low:+.4f}, {verdict.high:+.4f}]"


def _time(comparison: Comparison, contender: Contender) -> str:
    verdict = contender.target_verdict
    if verdict is None:
        return ""
    word = {"better": "sooner", "worse": "later"}.get(verdict.word, verdict.word)
    said = f"{_qualified(comparison, contender, verdict, word)}: {_evaluations(verdict)}"
    return f"{said}p {verdict.corrected_p:.3g}"


def _evaluations(verdict: Verdict) -> str:
    """Return how many evaluations more it takes to the target, without infinite numbers: those of missed targets."""
    if math.isinf(verdict.difference):
        return ""
    interval = f" [{verdict.low:+.0f}, {verdict.high:+.0f}]" if math.isfinite(verdict.low + verdict.high) else ""
    return f"{verdict.difference:+.0f}{interval}, "


def word_of(comparison: Comparison, contender: Contender) -> str:
    """Return the verdict on a contender in words, with what takes from it."""
    verdict = contender.verdict
    return "baseline" if verdict is None else _qualified(comparison, contender, verdict, verdict.word)


def _qualified(comparison: Comparison, contender: Contender, verdict: Verdict, word: str) -> str:
    """Return the word with what takes from it: settings that nobody tuned, a range that was too small."""
    if verdict.word == NONE_SHOWN:
        return NONE_SHOWN
    if not comparison.plan.tune:
        return "settings differ"
    beaten, whose = (comparison.baseline, "the baseline") if verdict.word == "better" else (contender, "it")
    return f"{word} on a range too small for {whose}" if beaten.edge else word


def _detectable(comparison: Comparison, contender: Contender) -> str:
    """Return the difference that studies spread like these show with a chance of 80%."""
    if contender.verdict is None:
        return ""
    least = detectable(comparison.studies, len(comparison.contenders) - 1, comparison.level)
    differences = paired_differences(contender.losses, comparison.baseline.losses)
    if least is None:
        return "none"
    return f"{least * stdev(differences):.4f}" if all(map(math.isfinite, differences)) else ""


def remarks(comparison: Comparison) -> list[str]:
    """Return what has to be said beside the table."""
    return [
        *_on_verdicts(comparison),
        *_on_looks(comparison),
        *_on_targets(comparison),
        *_on_trials(comparison),
        *_on_rates(comparison),
        *_on_settings(comparison),
    ]


def _on_verdicts(comparison: Comparison) -> list[str]:
    plan, others, made = comparison.plan, len(comparison.contenders) - 1, comparison.studies
    least = fewest_studies(others, comparison.level)
    short = ", so no difference of any size could be shown." if made < least else "."
    study = (
        f"A study is a tuning of its own: {plan.trials} rates placed at random, or settings where a spec has spaces; "
        f"the best on validation data counts. {_tuning(comparison)}"
        if plan.tune
        else "Fixed rates rank settings, not optimizers: no winner is named."
    )
    return [
        study,
        f"A verdict takes p <= {comparison.level:g} by Wilcoxon's signed ranks over the studies, after Holm's "
        f"correction for {others} contender{'' if others == 1 else 's'}, and an interval without zero: at least "
        f"{least} studies; this comparison has {made}{short}",
        "Difference: the median of the means of all pairs of studies (Hodges and Lehmann). Could have shown: the "
        "difference that studies spread like these show with a chance of 80%. Evaluations saved: how many fewer the "
        "better one takes to the other's final validation loss.",
    ]


def _tuning(comparison: Comparison) -> str:
    """Return how many gradients the tuning of the contenders evaluated."""
    counts = {c.spec: sum(trial["evaluations"] for trial in c.trials) for c in comparison.contenders}
    if len(set(counts.values())) == 1:
        return f"All trials of a contender took {next(iter(counts.values()))} gradient evaluations together."
    listed = "; ".join(f"{count} of {spec}" for spec, count in counts.items())
    return f"All trials of a contender took so many gradient evaluations together: {listed}."


def _on_looks(comparison: Comparison) -> list[str]:
    plan, earlier = comparison.plan, comparison.earlier
    said = []
    if len(plan.looks) > 1:
        said.append(
            f"Declared looks at {_listed(plan.looks)} studies, each at Pocock's level {pocock(plan.looks):g}: "
            f"together {LEVEL:.0%} of false verdicts. This comparison ended at {comparison.studies}."
        )
    if earlier:
        said.append(
            f"Look {len(earlier) + 1}: the same question was looked at before in this folder, with "
            f"{_listed(earlier)} studies, and no further look was declared. Each such look has a level "
            f"{FALLS_BY:.0f} times smaller than the one before, here {comparison.level:g}. --studies auto declares "
            "its looks."
        )
    return said


def _on_targets(comparison: Comparison) -> list[str]:
    metric, goal = next(iter(problem_named(comparison.plan.problem).targets.items()), (None, None))
    if metric is None:
        return []
    return [
        f"Target, fixed beforehand: {metric} {'<=' if metric == 'loss' else '>='} {goal:g} on validation data, held "
        "at the next point as well. Time to target is in gradient evaluations, by the same test on the same pairs: "
        "a study that misses the target takes longer than any other, two that miss it are a tie. Its verdicts have "
        "a level of their own."
    ]


def _on_trials(comparison: Comparison) -> list[str]:
    said = []
    for contender in comparison.contenders:
        whole = sum(map(math.isinf, contender.losses))
        if whole:
            said.append(
                f"{whole} of {comparison.studies} studies of {contender.spec} diverged: they count as the worst."
            )
        reasons = [trial["failed"] for trial in contender.trials if trial["failed"]]
        if reasons:
            said.append(
                f"{len(reasons)} of {len(contender.trials)} trials of {contender.spec} failed and count as diverged; "
                f"the first: {reasons[0]}. --retry-failed runs them again."
            )
    if any(trial["diverged"] for contender in comparison.contenders for trial in contender.trials):
        said.append(
            "A trial has diverged if its loss on validation data is not finite, or at the end more than ten times "
            "that of the initial weights (loss > initial + 9 |initial|)."
        )
    said.append("Every run had one thread; times are shown where all runs were made with --jobs 1, one at a time.")
    return said


def _on_rates(comparison: Comparison) -> list[str]:
    plan = comparison.plan
    more = {c.spec: len(c.trials) - plan.trials * comparison.studies for c in comparison.contenders}
    said = []
    if any(more.values()):
        counted = "; ".join(f"{number} of {spec}" for spec, number in more.items() if number)
        said.append(
            f"Where the best rate of a study was its lowest or its highest one, the study went on beyond it, by up to "
            f"{plan.moves} rates, until both neighbours of the best were worse. Trials made for that: {counted}."
        )
    said += [
        f"Range too small: {contender.spec} is best at its {contender.edge} rates; widen the range with "
        f"{'--lr-min' if contender.edge == 'lowest' else '--lr-max'}."
        for contender in comparison.contenders
        if contender.edge
    ]
    for spec in plan.specs if plan.tune else ():
        given = None if searches(spec) else given_rate(spec)
        if given is not None:
            said.append(
                f"Tuning replaces lr={given} of {spec} by rates whose largest value is tuned; --no-tune keeps it."
                if "(" in given
                else f"Tuning replaces lr={given} of {spec}; --no-tune keeps it."
            )
    return said


def _on_settings(comparison: Comparison) -> list[str]:
    """Return what the studies of contenders with spaces found."""
    said = []
    for position, contender in enumerate(comparison.contenders):
        tried = [(comparison.plan.settings(position, study.number), study.best) for study in contender.studies]
        values = [settings[best] for settings, best in tried if best in settings]
        if values:
            said.append(f"Best settings of {contender.spec} over {len(values)} studies: {found_in(values)}.")
    return said


def _listed(numbers: Sequence[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def headline(comparison: Comparison) -> str:
    """Return what was compared, in one line."""
    plan = comparison.plan
    return (
        f"{plan.problem}: {len(plan.specs)} contenders, {comparison.studies} studies of {plan.trials} "
        f"trial{'' if plan.trials == 1 else 's'}, {plan.budget} gradient evaluations each"
    )


def markdown(comparison: Comparison) -> str:
    """Return the report as Markdown."""
    table, rest = rows(comparison), sensitivity.rows(comparison)
    lines = [f"# {headline(comparison)}", ""]
    lines += [*as_table(table), "", *(f"- {remark}" for remark in remarks(comparison)), ""]
    if rest:
        lines += [
            "## Sensitivity",
            "",
            *as_table(rest),
            "",
            *(f"- {told}" for told in sensitivity.remarks(comparison)),
            "",
        ]
    lines += ["![validation loss against gradient evaluations](curves.png)", ""]
    lines += ["![paired differences in test loss, study by study](differences.png)", ""]
    if comparison.plan.tune:
        lines += ["![validation loss against learning rate](sensitivity.png)", ""]
    if comparison.at_sizes:
        lines += ["![test loss against batch size](batch_size.png)", ""]
    return "\n".join(lines)


def as_table(table: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    head = list(table[0])
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return [*lines, *("| " + " | ".join(row[name].replace("|", "\\|") for name in head) + " |" for row in table)]
