"""Forgetting parts of a stack's state, for a run that begins anew from trained weights."""

from typing import TYPE_CHECKING

import torch

from metaopt.engine.averaging import swap_back
from metaopt.engine.lanes import ANEW, Lane
from metaopt.errors import StepError, did_you_mean

if TYPE_CHECKING:
    from metaopt.stack import Stack

WORDS = ("moments", "averages", "counters")


def reset(stack: "Stack", names: tuple[str, ...]) -> None:
    """Forget what `names` say: moments, averages, counters or labels of wrappers; everything without a name.

    What is forgotten starts at the next update as in a new run. Raises StepError for another name, before anything
    changes.
    """
    labels = list(dict.fromkeys(label for lane in stack.lanes for label in lane.labelled))
    unknown = [name for name in names if name not in WORDS and name not in labels]
    if unknown:
        allowed = (*WORDS, *labels)
        raise StepError(
            f"reset_state({unknown[0]!r}): nothing is called so.{did_you_mean(unknown[0], allowed)} "
            f"There is: {', '.join(allowed)}"
        )
    if stack.inside_averaged:
        raise StepError("reset_state() inside averaged(): leave the context first, the weights are an average now")
    swap_back(stack)  # an average may hold the fast weights now
    chosen = set(names or WORDS)
    for entry in stack.param_groups:
        lane = stack.lane_of(entry)
        gone = {label for label in lane.labelled if "averages" in chosen or label in chosen}
        for p in entry["params"]:
            _forget(stack, lane, p, gone, moments="moments" in chosen)
        for key in lane.counter_keys:
            if "counters" in chosen or key.split(".")[0] in gone:
                entry[key] = 0
        if "counters" in chosen:
            entry["metaopt.updates"] = 0


def _forget(stack: "Stack", lane: Lane, p: torch.Tensor, labels: set[str], *, moments: bool) -> None:
    held = stack.state.get(p, {})
    of_base = [key for key in held if lane.is_base_key(key)]
    for key in [key for key in held if key.split(".")[0] in labels] + (of_base if moments else []):
        del held[key]
    if moments and of_base:
        held[ANEW] = 1.0
    if not held.keys() - {ANEW}:
        stack.state.pop(p, None)
