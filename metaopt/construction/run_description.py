"""What the log says about a run: the tags, the spec as text, the hyperparameters."""

import weakref
from typing import Any

import torch

from metaopt.construction.run_page import as_text, run_page
from metaopt.engine.chain import RUN_FLAGS, Chain, ParamGroup
from metaopt.engine.step.points import rate_tags
from metaopt.errors import SpecError
from metaopt.logger import RunPage
from metaopt.schedule import Schedule
from metaopt.scheduled_values import LR_SCALE
from metaopt.stack import Stack


def describe_run(stack: Stack) -> None:
    """Describe the run to the logger; values are read when the log is opened."""
    # a strong reference would tie the log's end, which closes it, to a cycle
    alive = weakref.ref(stack)
    stack.log.describe(
        tags=["train/loss", "train/grad_norm", *rate_tags(stack.param_groups)],
        spec=lambda: _spec(alive()),
        hparams=lambda: _hyperparameters(alive()),
        page=lambda: _page(alive()),
    )


def stack_value(stack: Stack, key: str) -> Any:
    """Return the value of a group entry for the stack: what all groups hold, or what the stack was built with."""
    groups = stack.param_groups
    if key == "lr":  # a scaled group has its own
        groups = [group for group in groups if group[LR_SCALE] == 1.0] or groups
    first = groups[0].get(key)
    if isinstance(first, torch.Tensor) or all(group.get(key) == first for group in groups[1:]):
        return first
    wrapper, name = stack.chains[0].hyperparameters.get(key, (None, key))
    return stack.defaults.get(key, first) if wrapper is None else getattr(wrapper, name)


def _spec(stack: Stack | None) -> str:
    if stack is None:
        return ""
    try:
        return str(stack.spec)
    except SpecError:  # a part that has no text still has a log
        return repr(stack.spec)


def _page(stack: Stack | None) -> RunPage:
    return RunPage() if stack is None else run_page(stack)


def _hyperparameters(stack: Stack | None) -> dict[str, bool | int | float | str]:
    if stack is None:
        return {}
    values: dict[str, bool | int | float | str] = {}
    for chain in stack.chains:
        groups = chain.groups_in(stack.param_groups)
        for key in groups[0] if groups else ():
            if _is_hyperparameter(chain, key):
                # the base's entries have bare names, as they were written; of several bases each has its part's
                name = f"{chain.name}.{key}" if chain.name and "." not in key else key
                written = _readable(groups[0], key, stack, alone=not chain.name)
                if written is not None:
                    values[name] = written
    return values


def _is_hyperparameter(chain: Chain, key: str) -> bool:
    """Return whether a group entry is a setting that runs are compared by; what only looks has none of these."""
    if key in chain.scalars or key in chain.counters or key.startswith("metaopt.") or key in RUN_FLAGS:
        return False
    wrapper, _ = chain.hyperparameters.get(key, (None, key))
    return key not in ("params", "name", "param_names", "initial_lr") and not (wrapper is not None and wrapper.observes)


def _readable(group: ParamGroup, key: str, stack: Stack, *, alone: bool) -> bool | int | float | str | None:
    """Return a value as a table of runs shows it; a schedule as it was written."""
    schedule = stack.schedules_of(group).get(key)
    value = schedule if schedule is not None else stack_value(stack, key) if alone else group[key]
    if isinstance(value, Schedule):
        return as_text(value)
    if isinstance(value, torch.Tensor):
        return float(value) if value.numel() == 1 else None
    if isinstance(value, tuple):
        return str(value)
    return value if isinstance(value, bool | int | float | str) else None
