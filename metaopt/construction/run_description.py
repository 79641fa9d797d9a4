"""What the log says about a run: the tags, the spec as text, the hyperparameters."""

import weakref
from typing import Any

import torch

from metaopt.engine.chain import RUN_FLAGS
from metaopt.engine.step import rate_tags
from metaopt.errors import SpecError
from metaopt.stack import Stack


def describe_run(stack: Stack) -> None:
    """Describe the run to the logger; values are read when the log is opened."""
    # a strong reference would tie the log's end, which closes it, to a cycle
    alive = weakref.ref(stack)
    stack.log.describe(
        tags=["train/loss", "train/grad_norm", *rate_tags(stack.param_groups)],
        spec=lambda: _spec(alive()),
        hparams=lambda: _hyperparameters(alive()),
    )


def stack_value(stack: Stack, key: str) -> Any:
    """Return the value of a group entry for the stack: what all groups hold, or what the stack was built with."""
    groups = stack.param_groups
    if key == "lr":  # a scaled group has its own
        groups = [group for group in groups if group["metaopt.lr_scale"] == 1.0] or groups
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


def _hyperparameters(stack: Stack | None) -> dict[str, bool | int | float | str]:
    if stack is None:
        return {}
    base = type(stack.base).__name__.lower()
    values: dict[str, bool | int | float | str] = {}
    scalars = {key for chain in stack.chains for key in chain.scalars}
    for key in stack.param_groups[0]:
        if key in scalars or key.startswith("metaopt.") or key in RUN_FLAGS:
            continue
        if key in ("params", "name", "param_names", "initial_lr"):
            continue
        value = stack_value(stack, key)
        name = key if "." in key else f"{base}.{key}"
        if key in stack.schedules:
            values[name] = repr(stack.schedules[key])
        elif isinstance(value, bool | int | float | str):
            values[name] = value
        elif isinstance(value, torch.Tensor) and value.numel() == 1:
            values[name] = float(value)
        elif isinstance(value, tuple):
            values[name] = str(value)
    return values
