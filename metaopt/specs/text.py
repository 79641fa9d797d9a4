"""From a value to its text in a spec."""

import math
from inspect import isroutine
from typing import Any

import torch

from metaopt.deferred import Deferred
from metaopt.errors import SpecError
from metaopt.registry import registry
from metaopt.schedule import FunctionSchedule, TupleSchedule


def to_text(value: Any, where: str) -> str:
    """Return a value as spec text. Raises SpecError, naming `where`, for what has no text."""
    if isinstance(value, FunctionSchedule) or isroutine(value):
        raise SpecError(
            f"{where}: a Python function has no text and works only in Python; "
            f"for a spec, write it as a metaopt.Schedule and register that"
        )
    if isinstance(value, TupleSchedule):
        return to_text(value.members, where)
    if isinstance(value, Deferred):
        return _deferred_text(value, where)
    if isinstance(value, bool | int | str) or value is None:
        return repr(value)
    if isinstance(value, float):
        if math.isnan(value):
            raise SpecError(f"{where}: nan has no text")
        return repr(value)
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        # the shortest number that makes the same tensor
        shorter = (float(f"{value.item():.{digits}g}") for digits in range(1, 18))
        return repr(next(x for x in shorter if torch.equal(torch.full_like(value, x), value)))
    if isinstance(value, tuple):
        inner = ", ".join(to_text(item, where) for item in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, list):
        return f"[{', '.join(to_text(item, where) for item in value)}]"
    raise SpecError(
        f"{where}: only numbers, text, None, tuples and lists can be written as text, got {type(value).__name__}"
    )


def _deferred_text(value: Deferred, where: str) -> str:
    name = registry.name_of(type(value))
    if name is None:
        raise SpecError(f"{where}: {type(value).__name__} is not registered and has no text")
    if value.positional is not None:
        return f"{name}({', '.join(to_text(member, where) for member in value.positional)})"
    arguments = ", ".join(f"{key}={to_text(member, where)}" for key, member in value.given.items())
    return f"{name}({arguments})"
