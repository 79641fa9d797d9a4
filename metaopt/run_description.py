"""What the log says about a run: the tags, the spec as text, the hyperparameters."""

import weakref

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
    for key, value in stack.param_groups[0].items():
        if key.startswith("metaopt.") or key in RUN_FLAGS or key in ("params", "name", "param_names", "initial_lr"):
            continue
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
