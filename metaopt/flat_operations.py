"""What an operation of a rule is on flat memory: one call of torch, whose result goes into room that is given.

Operands are memories as rows of chunks, numbers of chunks as one column, and numbers. They may differ in dtype.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from metaopt.flat_memory import number_on
from metaopt.multi_tensor import at_least_float32


def call(op: str, args: Sequence[Any], out: torch.Tensor) -> None:
    """Write the result of an operation to room of its dtype, which may be that of an operand."""
    if op in _CALLS:
        # of numbers, torch wants a first one as a tensor
        _CALLS[op](as_tensor(args[0], at_least_float32(out.dtype)), *args[1:], out=out)
    else:
        _MORE[op](*args, out)


def as_tensor(number: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return a number as a tensor in main memory, which arithmetic takes without a launch."""
    return number if isinstance(number, torch.Tensor) else torch.tensor(number, dtype=dtype, device="cpu")


def beside(number: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a number as a tensor on a device: `torch.where` would send one from main memory over, and wait."""
    return number if isinstance(number, torch.Tensor) else number_on(number, dtype, device)


def _where(condition: Any, a: Any, b: Any, out: torch.Tensor) -> None:
    condition = condition if condition.dtype == torch.bool else condition != 0
    a, b = (beside(each, out.dtype, out.device).to(out.dtype) for each in (a, b))
    torch.where(condition, a, b, out=out)


def _lerp(start: Any, end: Any, weight: Any, out: torch.Tensor) -> None:
    weight = weight.to(out.dtype) if isinstance(weight, torch.Tensor) else weight
    torch.lerp(start.to(out.dtype), end.to(out.dtype), weight, out=out)


def _addcmul(a: Any, b: Any, c: Any, out: torch.Tensor) -> None:
    if all(isinstance(each, torch.Tensor) and each.dim() for each in (a, b, c)):
        torch.addcmul(a.to(out.dtype), b.to(out.dtype), c.to(out.dtype), out=out)
        return
    # CUDA's kernel takes no number in the first two places
    b, c = (each.to(out.dtype) if isinstance(each, torch.Tensor) and each.dim() else each for each in (b, c))
    product = as_tensor(b * c, at_least_float32(out.dtype))
    torch.add(product, a, out=out)


_CALLS: dict[str, Callable[..., Any]] = {
    **{name: getattr(torch, name) for name in ("add", "sub", "mul", "div", "lt", "le", "gt")},
    **{name: getattr(torch, name) for name in ("hypot", "sqrt", "abs", "neg", "square", "reciprocal", "clamp")},
    # of 1 for what is true, and 0
    "and": torch.mul,
}
_MORE: dict[str, Callable[..., Any]] = {"where": _where, "lerp": _lerp, "addcmul": _addcmul}
