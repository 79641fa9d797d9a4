"""What a stack tells its log about the run: the tags, the spec as text, the hyperparameters."""

import weakref
from typing import TYPE_CHECKING

from metaopt.errors import SpecError

if TYPE_CHECKING:
    from metaopt.stack import Stack

# how to run, not what is computed
_RUN_FLAGS = {"foreach", "fused", "capturable", "differentiable"}


def rate_tags(stack: "Stack") -> list[str]:
    """Return the tag of every group's learning rate, in the groups' order."""
    groups = stack.param_groups
    if len(groups) == 1:
        return ["train/learning_rate"]
    return [f"train/learning_rate/{group.get('name', position)}" for position, group in enumerate(groups)]


def describe_run(stack: "Stack") -> None:
    """Have the stack's log told what the run is, in the words of the moment at which it opens."""
    # a strong reference would tie the log's end, which closes it, to a cycle
    alive = weakref.ref(stack)
    stack.metrics_of_run.describe(
        tags=["train/loss", "train/grad_norm", *rate_tags(stack)],
        spec=lambda: _spec(alive()),
        hparams=lambda: _hyperparameters(alive()),
    )


def _spec(stack: "Stack | None") -> str:
    if stack is None:
        return ""
    try:
        return str(stack.spec)
    except SpecError:  # a part that has no text still has a log
        return repr(stack.spec)


def _hyperparameters(stack: "Stack | None") -> dict[str, bool | int | float | str]:
    if stack is None:
        return {}
    base = type(stack.base).__name__.lower()
    values: dict[str, bool | int | float | str] = {}
    for key, value in stack.param_groups[0].items():
        if key.startswith("metaopt.") or key in _RUN_FLAGS or key in ("params", "name", "param_names", "initial_lr"):
            continue
        name = key if "." in key else f"{base}.{key}"
        if key in stack.schedules:
            values[name] = repr(stack.schedules[key])
        elif isinstance(value, bool | int | float | str):
            values[name] = value
        elif isinstance(value, tuple):
            values[name] = str(value)
    return values
