"""Comparing runs and state, bit for bit, and saying where they part."""

import pickle
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from metaopt.stack import Stack

# what torch and the engine keep on an optimizer, which no checkpoint needs
_ENGINE = frozenset({"param_groups", "state", "defaults", "step", "_opt_called", "grad_scale", "found_inf"}) | {
    "_need_device_dtype_check_for_fused"
}


def same(a: Any, b: Any) -> bool:
    """Tell whether two values of a state dict are equal, tensors bit for bit in value, dtype and shape."""
    if a is b:
        return True
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return _same_tensor(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple | deque) and isinstance(b, list | tuple | deque):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if type(a) is not type(b):
        return False
    if "__eq__" not in vars(type(a)) and hasattr(a, "__dict__"):
        return same(vars(a), vars(b))
    return bool(a == b or a != a)


def _same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape or a.layout != b.layout:
        return False
    if a.layout is torch.sparse_coo:
        a, b = a.coalesce(), b.coalesce()
        return _same_tensor(a.indices(), b.indices()) and _same_tensor(a.values(), b.values())
    if torch.equal(a, b):
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return False
    # not a number equals itself here
    return bool(torch.equal(a.isnan(), b.isnan())) and bool(torch.equal(a[~a.isnan()], b[~b.isnan()]))


def first_difference(a: Any, b: Any, path: str = "") -> str:
    """Return where two state dicts part, such as `state[0]['exp_avg']`, or an empty text."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in [*a, *(key for key in b if key not in a)]:
            if key not in a or key not in b:
                return f"{path}[{key!r}] (only in one of them)"
            found = first_difference(a[key], b[key], f"{path}[{key!r}]")
            if found:
                return found
        return ""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return next(
            (f for i, (x, y) in enumerate(zip(a, b, strict=True)) if (f := first_difference(x, y, f"{path}[{i}]"))), ""
        )
    if same(a, b):
        return ""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype:
            return f"{path} ({a.dtype} and {b.dtype})"
        return f"{path} (tensors that differ{by(a, b)})"
    return f"{path} ({_short(a)} and {_short(b)})"


def by(a: torch.Tensor, b: torch.Tensor) -> str:
    """Return ` by at most 1.2e-3`, or an empty text where that cannot be said."""
    if a.shape != b.shape or a.layout is not torch.strided or b.layout is not torch.strided:
        return ""
    return (
        f" by at most {float((a.to(torch.complex128) - b.to(torch.complex128)).abs().max()):.2g}" if a.numel() else ""
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def tensors(value: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor inside a value with the path to it."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from tensors(item, f"{path}[{index}]")


def attributes(opt: Stack) -> dict[str, bytes]:
    """Return what the base and the wrappers keep outside groups and state: attribute -> its pickled value."""
    found = {}
    owners = {type(opt.base).__name__: vars(opt.base), **{w.label: vars(w) for w in opt.wrappers}}
    for owner, held in owners.items():
        for name, value in held.items():
            if name in _ENGINE or name.endswith("_hooks"):
                continue
            try:
                found[f"{owner}.{name}"] = pickle.dumps(value)
            except Exception:  # what cannot be pickled cannot be compared
                continue
    return found


def changed_attributes(before: dict[str, bytes], after: dict[str, bytes]) -> str:
    """Return a sentence that names the attributes that differ, or an empty text."""
    names = [name for name, value in after.items() if before.get(name) != value]
    return f" (attributes that changed during the run and are in no state dict: {', '.join(names)})" if names else ""
