"""Watching a step for reads that would wait for the device: tensors are followed from parameters and gradients on.

On a CPU every read is free, so none can be measured. What would live on the device is known by descent: parameters,
gradients, what is computed from them, and what is made with `device=`. A counter that an optimizer makes on the host,
such as `torch.tensor(0.0)`, may be read. Blocking copies between host and device (`copy_`, `.to(other.device)`,
`torch.tensor(number, device=...)`) look like any other operator here: only a run on a device tells, see `waits_raise`.
"""

import os
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# operators that hand a value, or a shape that depends on values, to the host
READING = frozenset(
    [
        "_local_scalar_dense",
        "item",
        "equal",
        "is_nonzero",
        "nonzero",
        "masked_select",
        "unique_consecutive",
        "_unique",
        "_unique2",
        "unique_dim",
        "_coalesce",
    ]
)
# functions of Python that read without calling an operator
METHODS = frozenset(["tolist", "numpy", "__array__", "cpu"])
MAKERS = frozenset(
    [
        "tensor",
        "zeros",
        "ones",
        "full",
        "empty",
        "arange",
        "rand",
        "randn",
        "as_tensor",
        "zeros_like",
        "ones_like",
        "full_like",
    ]
)


class Descent:
    """The tensors that would live on the device, known by their storages."""

    def __init__(self, tensors: Iterable[torch.Tensor], source: str) -> None:
        # the storages are kept: a freed one's address would soon be another tensor's
        self._known: dict[int, torch.UntypedStorage] = {}
        self._source = source
        self.reads: list[str] = []
        self.add(list(tensors))

    def add(self, values: Any) -> None:
        """Count every tensor in `values` among them."""
        for storage in _storages(values):
            self._known[storage._cdata] = storage

    def among(self, values: Any) -> bool:
        """Tell whether one of the tensors in `values` is among them."""
        return any(storage._cdata in self._known for storage in _storages(values))

    def read(self, what: str) -> None:
        """Note a read, with the line of the part, or else the innermost one, that asked for it."""
        frames = [f for f in traceback.extract_stack() if "metaopt/testing" not in f.filename.replace("\\", "/")]
        frame = next((f for f in reversed(frames) if f.filename == self._source), frames[-1])
        self.reads.append(f"{what} at {os.path.basename(frame.filename)}:{frame.lineno}: {frame.line}")


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for value in tree_leaves(values):
        if isinstance(value, torch.Tensor):
            if value.layout is torch.sparse_coo:
                yield value._values().untyped_storage()
            else:
                yield value.untyped_storage()


class OperatorWatch(TorchDispatchMode):
    """Follows descent through operators, and notes those that read."""

    def __init__(self, descent: Descent) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.descent = descent

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        descends = self.descent.among((args, kwargs))
        if descends and (name in READING or _counts_a_mask(name, args)):
            self.descent.read(f"aten.{name}")
        result = func(*args, **kwargs)
        if descends:
            # an operator in place writes into its first argument
            self.descent.add((result, args[:1]) if name.endswith("_") else result)
        return result


def _counts_a_mask(name: str, args: Any) -> bool:
    """Tell whether an indexing by a mask has to count it: writing one number through a mask does not."""
    if name not in ("index", "index_put", "index_put_"):
        return False
    masked = any(isinstance(v, torch.Tensor) and v.dtype == torch.bool for v in tree_leaves(args[1]))
    return masked and not (len(args) > 2 and args[2].numel() == 1)


class FunctionWatch(TorchFunctionMode):
    """Follows what is made with `device=`, and notes the methods that read without an operator."""

    def __init__(self, descent: Descent) -> None:
        super().__init__()
        self.descent = descent

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if (name in METHODS or _copies_to_the_host(name, args, kwargs)) and self.descent.among(args[:1]):
            self.descent.read(f"Tensor.{name}")
        result = func(*args, **kwargs)
        if name in MAKERS and kwargs.get("device") is not None:
            self.descent.add(result)
        return result


def _copies_to_the_host(name: str, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Tell whether this is a `tensor.to("cpu")` that waits until the copy is there."""
    targets = [value for value in (*args[1:], kwargs.get("device")) if isinstance(value, str)]
    return name == "to" and "cpu" in targets and not kwargs.get("non_blocking")


@contextmanager
def waits_raise() -> Iterator[None]:
    """Let torch itself raise where the host waits for a CUDA device."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            # torch says so once in a process: as an error it would leave the mode set
            warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
