"""A reset that a user asks for, most often after a load: what was gathered is forgotten, and counts are set back.

The next update of these parameters is a first one (`first_update`): the base itself makes new state in its step.
"""

import torch

from metaopt.engine import averages
from metaopt.engine.chain import PLACEHOLDER, Chain
from metaopt.engine.run.entries import STEP_CALLS, UPDATES
from metaopt.engine.run.run import Run
from metaopt.errors import StepError, did_you_mean
from metaopt.scheduled_values import LR_FACTOR

RESET_NAMES = ("moments", "averages", "counters")


def reset(run: Run, names: tuple[str, ...]) -> None:
    """Forget what `names` say: moments, averages, counters or labels of wrappers; everything without a name.

    What is forgotten starts at the next update as in a new run. If the parameters hold an average, they get their
    weights back. Raises StepError for a name that says nothing, and inside `averaged()`.
    """
    _validate(run, names)
    averages.restore_weights(run)
    run.adopt_rates()
    chosen = set(names or RESET_NAMES)
    exchanging = {each.wrapper.label for each in run.structure.exchanges}
    if run.exchange is not None and chosen & {"averages", "counters", *exchanging}:
        run.exchange.drop()  # what is on its way belongs to anchors that go, or is awaited at a count of before
    for group in run.param_groups:
        chain = run.structure.chain_of(group)
        gone = {label for label in chain.labelled if "averages" in chosen or label in chosen}
        for p in group["params"]:
            _forget(run, chain, p, gone, moments="moments" in chosen)
        for key, initial in chain.counters.items():
            if "counters" in chosen or key.split(".")[0] in gone:
                group[key] = initial
        for key, (wrapper, scalar) in chain.scalars.items():
            if wrapper.label in gone:
                group[key].fill_(scalar.initial)
        if "counters" in chosen:
            group[UPDATES] = 0
            if STEP_CALLS in group:
                group[STEP_CALLS] = 0
            group.pop(LR_FACTOR, None)
    run.begin_schedules()
    run.invalidate()


def _validate(run: Run, names: tuple[str, ...]) -> None:
    labels = run.structure.labels()
    unknown = [name for name in names if name not in RESET_NAMES and name not in labels]
    if unknown:
        allowed = (*RESET_NAMES, *labels)
        raise StepError(
            f"reset_state({unknown[0]!r}): unknown name.{did_you_mean(unknown[0], allowed)} "
            f"Choose from: {', '.join(allowed)}"
        )
    if run.inside_averaged:
        raise StepError("reset_state() inside averaged(): leave the context first, the weights are an average now")


def _forget(run: Run, chain: Chain, p: torch.Tensor, labels: set[str], *, moments: bool) -> None:
    param_state = run.state.get(p, {})
    of_base = [key for key in param_state if chain.is_base_key(key)]
    for key in [key for key in param_state if str(key).split(".")[0] in labels] + (of_base if moments else []):
        del param_state[key]
    if moments and of_base:
        param_state[PLACEHOLDER] = 1.0
    if not param_state.keys() - {PLACEHOLDER}:
        run.state.pop(p, None)
