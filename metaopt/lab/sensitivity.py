"""How much the final loss depends on the learning rate, and on the batch size, as numbers and as a table."""

import math
from statistics import median
from typing import Any

from metaopt.lab.bands import quartiles
from metaopt.lab.batch_sizes import LR
from metaopt.lab.comparison import Comparison, Contender, loss_of
from metaopt.lab.statistics import paired_differences, pseudo_median, rank_interval


def numbers(comparison: Comparison) -> dict[str, Any]:
    """Return the numbers on the learning rate, and on the batch size if it was asked for, per contender."""
    found: dict[str, Any] = {}
    if _of_rates(comparison):
        found["lr"] = [{"spec": c.spec, **_over_rates(comparison, c)} for c in comparison.contenders]
    if comparison.at_sizes:
        found["batch_size"] = over_batch_sizes(comparison)
    return found


def over_batch_sizes(comparison: Comparison) -> list[dict[str, Any]]:
    """Return for each batch size, the problem's own among them, each contender's losses and how they differ."""
    own = max(comparison.at_sizes) // 2  # the others are half of it and twice of it
    every = {own: (comparison.plan.budget, comparison.contenders)}
    every |= {size: (other.budget, contenders) for size, (other, contenders) in comparison.at_sizes.items()}
    return [
        {
            "batch_size": size,
            "evaluations": evaluations,
            "contenders": [_at_size(c, at_own) for c, at_own in zip(contenders, comparison.contenders, strict=True)],
        }
        for size, (evaluations, contenders) in sorted(every.items())
    ]


def _at_size(contender: Contender, own: Contender) -> dict[str, Any]:
    """Return a contender's losses on test data, their quartiles, and the paired difference from its own batch size."""
    low, middle, high = map(float, quartiles(contender.losses))
    rates = [study.rate for study in contender.studies if study.rate is not None]
    found = {
        "spec": contender.spec,
        "losses": contender.losses,
        "median": middle,
        "quartiles": [low, high],
        "rate": median(rates) if rates else None,
    }
    if contender is not own:
        d = paired_differences(contender.losses, own.losses)
        low, high = rank_interval(d)
        found |= {"difference": pseudo_median(d), "low": low, "high": high}
    return found


def _over_rates(comparison: Comparison, contender: Contender) -> dict[str, float | None]:
    """Return by how much the loss on validation data rises at the next lower and the next higher rate of a study.

    Medians over studies; None for a contender with spaces, whose settings have no neighbours.
    """
    plan = comparison.plan
    rises: dict[int, list[float]] = {-1: [], 1: []}
    for study in contender.studies:
        if not isinstance(study.best, float):
            continue
        losses = [loss_of(trial, "validation") for trial in study.trials.values()]
        best = list(study.trials).index(study.best)
        for side, found in rises.items():
            if 0 <= best + side < len(losses) and math.isfinite(losses[best]):
                found.append(losses[best + side] - losses[best])
    return {
        "factor": (plan.highest / plan.lowest) ** (1 / plan.trials),
        "lower": median(rises[-1]) if rises[-1] else None,
        "higher": median(rises[1]) if rises[1] else None,
    }


def rows(comparison: Comparison) -> list[dict[str, str]]:
    """Return a table with a row per contender, every cell as text; none where there is nothing to say."""
    found = numbers(comparison)
    table: list[dict[str, str]] = [{"stack": c.spec} for c in comparison.contenders]
    for row, entry in zip(table, found.get("lr", ()), strict=False):
        for side, sign in (("lower", "/"), ("higher", "x")):
            row[f"loss at lr {sign} {entry['factor']:.3g}"] = _rise(entry[side])
    for at in found.get("batch_size", ()):
        for row, entry in zip(table, at["contenders"], strict=True):
            row[f"batch size {at['batch_size']}"] = _cell(entry)
    return [row for row in table if len(row) > 1]


def _rise(value: float | None) -> str:
    return "" if value is None else f"+{value:.4f}" if math.isfinite(value) else "diverged"


def _cell(entry: dict[str, Any]) -> str:
    middle, rate = entry["median"], entry["rate"]
    text = f"{middle:.4f}" if math.isfinite(middle) else "diverged"
    text += "" if rate is None else f" at lr {rate:.3g}"
    if "difference" not in entry:
        return text
    return f"{text}, {entry['difference']:+.4f} [{entry['low']:+.4f}, {entry['high']:+.4f}]"


def remarks(comparison: Comparison) -> list[str]:
    """Return what has to be said beside the table."""
    said = []
    if _of_rates(comparison):
        said.append(
            "Loss at other rates: by how much the loss on validation data rises from a study's best rate to its next "
            "lower and its next higher one, the median over studies."
        )
    if comparison.at_sizes:
        each = "; ".join(f"{entry['evaluations']} at {entry['batch_size']}" for entry in over_batch_sizes(comparison))
        made = sum(t["evaluations"] for _, at in comparison.at_sizes.values() for c in at for t in c.trials)
        again = "tuned anew at each size, by as many studies of as many trials" if comparison.plan.tune else "not tuned"
        said.append(
            f"Batch sizes: every run sees as many samples (gradient evaluations: {each}); contenders are {again}. "
            "Median loss on test data, and the difference from the problem's own batch size, paired by study, with an "
            f"interval of 95% that is not corrected: no verdict is taken from it. It took {made} gradient evaluations."
        )
    return said


def _of_rates(comparison: Comparison) -> bool:
    return comparison.plan.tune and LR in comparison.plan.sensitivity
