"""A comparison's numbers from its table of trials, by scipy and numpy and nothing of metaopt."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.05

Row = dict[str, str]
Numbers = dict[str, Any]


def of_comparison(folder: Path, level: float = LEVEL) -> dict[str, Numbers]:
    """Return the numbers of each contender from trials.csv, the baseline's without verdicts."""
    trials, baseline = _read(folder / "trials.csv")
    chosen = {spec: [_best(rows) for rows in studies.values()] for spec, studies in trials.items()}
    losses = {spec: [float(run["test_loss"]) for run in runs] for spec, runs in chosen.items()}
    reached = {spec: [float(run["reached"]) for run in runs] for spec, runs in chosen.items()}
    met = any(math.isfinite(at) for row in reached.values() for at in row)
    verdicts = of_verdicts(losses, baseline, level)
    times = of_verdicts(reached, baseline, level) if met else {}
    found: dict[str, Numbers] = {}
    for spec, runs in chosen.items():
        saved = [_saved(run, other) for run, other in zip(runs, chosen[baseline], strict=True)]
        found[spec] = {
            "losses": losses[spec],
            "reached": reached[spec],
            "rates": [float(run["lr"]) for run in runs],
            "verdict": verdicts.get(spec),
            "target_verdict": times.get(spec),
            "evaluations_saved": None if spec == baseline else median(saved),
            "shares_saved": [s / float(run["budget"]) for s, run in zip(saved, runs, strict=True)],
            "cells": _cells([row for rows in trials[spec].values() for row in rows], runs),
        }
    effect = detectable(len(losses[baseline]), len(losses) - 1, level)
    for spec, verdict in verdicts.items():
        d = differences(losses[spec], losses[baseline])
        shown = "none" if effect is None else f"{effect * stdev(d):.4f}" if np.isfinite(d).all() else ""
        found[spec]["cells"] |= _verdict_cells(verdict, times.get(spec), found[spec], shown)
    return found


def _read(path: Path) -> tuple[dict[str, dict[int, list[Row]]], str]:
    """Return the trials by contender and study, and which contender is the baseline."""
    trials: dict[str, dict[int, list[Row]]] = {}
    baseline = ""
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            trials.setdefault(row["contender"], {}).setdefault(int(row["study"]), []).append(row)
            baseline = row["contender"] if row["baseline"] == "True" else baseline
    return trials, baseline


def _best(rows: Sequence[Row]) -> Row:
    """Return the trial with the least loss on validation data, the first of equal ones."""
    best = rows[0]
    for row in rows[1:]:
        if float(row["validation_loss"]) < float(best["validation_loss"]):
            best = row
    return best


# ---- one contender against the baseline


def of_verdicts(scores: dict[str, list[float]], baseline: str, level: float) -> dict[str, Numbers]:
    """Return the verdict on each contender but the baseline; less is better."""
    paired = {s: differences(row, scores[baseline]) for s, row in scores.items() if s != baseline}
    ps = {spec: signed_rank_p(d) for spec, d in paired.items()}
    corrected = dict(zip(ps, _holm(list(ps.values())), strict=True))
    found = {}
    for spec, d in paired.items():
        means = _pair_means(d)
        low, high = _interval(means, len(d), level)
        shown = corrected[spec] <= level and (low > 0 or high < 0)
        found[spec] = {
            "difference": median(means),
            "low": low,
            "high": high,
            **_student(d, level),
            "superiority": sum(1.0 if x < 0 else 0.5 if x == 0 else 0.0 for x in d) / len(d),
            "p": ps[spec],
            "corrected_p": corrected[spec],
            "level": level,
            "word": "no difference shown" if not shown else "better" if high < 0 else "worse",
        }
    return found


def differences(scores: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Return the paired differences; two studies that are both lost are a tie."""
    return [0.0 if a == b else a - b for a, b in zip(scores, baseline, strict=True)]


def signed_rank_p(d: Sequence[float]) -> float:
    """Return the exact two-sided p of Wilcoxon's signed ranks: scipy's own, and with ties or zeros over all signs."""
    ranks = np.sign(d) * stats.rankdata(np.abs(d))
    if len(set(np.abs(ranks))) == len(ranks):
        finite = ranks if not np.isfinite(d).all() else d
        return float(stats.wilcoxon(finite, method="exact").pvalue)
    if not ranks.any():
        return 1.0
    # of ranks that are shared: the signs of all studies, in every way (Pratt 1959 for zeros)
    found = stats.permutation_test(
        (ranks,), lambda x, axis: x.sum(axis=axis), permutation_type="samples", n_resamples=np.inf, batch=2**14
    )
    return float(found.pvalue)


def _holm(ps: Sequence[float]) -> list[float]:
    """Return Holm's step-down p: of the k-th smallest the largest of (m - j + 1) p(j) up to it."""
    smallest = np.argsort(ps, kind="stable")
    steps = np.minimum(1.0, (len(ps) - np.arange(len(ps))) * np.asarray(ps)[smallest])
    return [float(p) for p in np.maximum.accumulate(steps)[np.argsort(smallest)]]


def _pair_means(d: Sequence[float]) -> list[float]:
    """Return the means of all pairs, each with itself too; infinite ones of both signs cancel."""
    means = []
    for i, a in enumerate(d):
        for b in d[i:]:
            means.append(0.0 if a == -b else (a + b) / 2)
    return sorted(means)


def _interval(means: Sequence[float], n: int, level: float) -> tuple[float, float]:
    """Return the means of pairs behind as many at each end as sums of ranks are too improbable."""
    ways = np.ones(1)
    for rank in range(1, n + 1):  # the sums of every subset of ranks, as the coefficients of a product
        ways = np.convolve(ways, [1.0, *[0.0] * (rank - 1), 1.0])
    cut = int(np.sum(np.cumsum(ways) / 2.0**n <= level / 2))
    return (means[cut - 1], means[-cut]) if cut else (-math.inf, math.inf)


def _student(d: Sequence[float], level: float) -> Numbers:
    both = {math.inf, -math.inf} <= set(d)
    if not np.isfinite(d).all():
        return {"mean": math.nan if both else sum(d), "mean_low": -math.inf, "mean_high": math.inf}
    if len(set(d)) == 1:
        return {"mean": d[0], "mean_low": d[0], "mean_high": d[0]}
    found = stats.ttest_1samp(d, 0.0).confidence_interval(1 - level)
    return {"mean": float(np.mean(d)), "mean_low": float(found.low), "mean_high": float(found.high)}


def detectable(studies: int, others: int, level: float) -> float | None:
    """Return the effect that Wilcoxon's test shows in 80% of 4,000 drawn samples, or None where none can be shown."""
    drawn = np.random.default_rng(0).normal(size=(4000, studies))
    if others * 2.0 / 2**studies > level:
        return None
    low, high = 0.0, 16.0
    while high - low > 0.005:
        middle = (low + high) / 2
        shown = stats.wilcoxon(drawn + middle, axis=1, method="exact").pvalue * others <= level
        low, high = (low, middle) if np.mean(shown) >= 0.8 else (middle, high)
    return high


def _saved(run: Row, other: Row) -> float:
    """Return how many evaluations before its end the better of two runs had the other's final validation loss."""
    mine, its = float(run["validation_loss"]), float(other["validation_loss"])
    if mine == its:
        return 0.0
    better, goal, sign = (run, its, 1.0) if mine < its else (other, mine, -1.0)
    end, last = float(better["evaluations"]), None
    for at, loss in json.loads(better["curve"]):
        if loss is not None and loss <= goal:
            if last is not None and math.isfinite(goal):
                at = float(np.interp(-goal, [-last[1], -loss], [last[0], at]))
            return sign * float(end - at)
        last = None if loss is None else (at, loss)
    return 0.0


# ---- the cells of the report


def _cells(trials: Sequence[Row], runs: Sequence[Row]) -> dict[str, str]:
    """Return the cells of a contender that are numbers of its own."""
    lost, failed = sum(t["diverged"] == "True" for t in trials), sum(t["failed"] != "" for t in trials)
    whole = sum(math.isinf(float(run["test_loss"])) for run in runs)
    reached = [float(run["reached"]) for run in runs]
    met, middle = sum(map(math.isfinite, reached)), median(reached)
    diverged = f"{lost} of {len(trials)} trials" + (f", {failed} of them failed" if failed else "")
    rates = [float(run["lr"]) for run in runs if run["lr"] not in ("", "nan")]
    return {
        "lr": f"{median(rates):.3g} ({min(rates):.3g} to {max(rates):.3g})" if rates else "as given",
        "weights": runs[0]["weights"],
        "test loss": _spread([float(run["test_loss"]) for run in runs]),
        **({"accuracy": _spread([_worst(run["test_accuracy"]) for run in runs])} if "test_accuracy" in runs[0] else {}),
        "target reached": f"{met} of {len(runs)}" + (f", median {middle:g}" if math.isfinite(middle) else ""),
        "diverged": diverged + (f"; {whole} of {len(runs)} studies" if whole and len(trials) > len(runs) else ""),
        "evaluations": str(max(int(run["evaluations"]) for run in runs)),
        "updates": str(max(int(run["updates"]) for run in runs)),
        "state": _state(runs),
    }


def _worst(value: str) -> float:
    return -math.inf if value in ("", "nan") else float(value)


def _spread(values: Sequence[float]) -> str:
    if np.isfinite(values).all():
        return f"{mean(values):.4f} ± {stdev(values):.4f}"
    order, n = sorted(values), len(values)
    # the mean of the two values beside a place between them, as Hyndman and Fan's second definition has it
    at = [(order[math.ceil(n * share) - 1] + order[math.floor(n * share)]) / 2 for share in (0.25, 0.5, 0.75)]
    return "median {1:.4f} [{0:.4f}, {2:.4f}]".format(*at) if math.isfinite(at[1]) else "diverged"


def _state(runs: Sequence[Row]) -> str:
    run = next((run for run in runs if int(run["parameters_bytes"])), None)
    if run is None:
        return ""
    peak = f", peak {int(run['peak_bytes']) / 2**20:.0f} MiB" if run["peak_bytes"] else ""
    return f"{int(run['state_bytes']) / int(run['parameters_bytes']):.2f} x parameters{peak}"


def _evaluations(difference: float, low: float, high: float, **_: float) -> str:
    if np.isinf([difference, low, high]).any():
        return "" if math.isinf(difference) else f"{difference:+.0f}, "
    return f"{difference:+.0f} [{low:+.0f}, {high:+.0f}], "


def _verdict_cells(verdict: Numbers, times: Numbers | None, found: Numbers, shown: str) -> dict[str, str]:
    cells = {
        "difference [95%]": "{difference:+.4f} [{low:+.4f}, {high:+.4f}]".format(**verdict),
        "p (Holm)": f"{verdict['corrected_p']:.3g}",
        "better in": f"{100 * verdict['superiority']:.0f}% of studies",
        "evaluations saved": f"{found['evaluations_saved']:+.0f}",
        "could have shown": shown,
    }
    if times is not None:
        cells["time to target"] = f"{_evaluations(**times)}p {times['corrected_p']:.3g}"
    return cells
