"""How many kernels one operator of torch launches on an NVIDIA card, by the rules in torch's own source.

A multi-tensor call (`_foreach_...`, `_fused_...`) cuts each tensor into chunks of 65,536 elements and launches a kernel
as soon as its arguments are full (ATen/native/cuda/MultiTensorApply.cuh): after so many tensors or so many chunks. It
falls back to a loop over the tensors if they do not share dtype, sizes and strides (ATen/native/ForeachUtils.h).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

CHUNK = 1 << 16
# by CUDA: for how many lists a call takes, how many tensors the arguments of one kernel hold; and how many chunks
TENSORS = {13: (770, 448, 336, 252, 210), 12: (110, 64, 48, 36, 30)}
TENSORS_WITH_NUMBERS = {13: (672, 448, 336, 252, 210), 12: (96, 64, 48, 36, 30)}
CHUNKS = {13: 2240, 12: 320}
# norms of so many tensors are finished by one kernel, and so many tensors are joined by one
NORMS, JOINED = 400, 128

# operators that launch nothing, beside views
NOTHING = ("prim::", "profiler::", "aten::empty", "aten::new_empty", "aten::lift", "aten::set_", "aten::resize_")
ALSO_NOTHING = frozenset({"aten::detach", "aten::alias", "aten::is_pinned", "aten::_unsafe_view", "aten::detach_"})

Launches = dict[int, int]


def launches_of(operator: Any, args: Sequence[Any], made: Any) -> Launches:
    """Return how many kernels an operator launches, by CUDA version; `made` is what it returned."""
    name = operator._schema.name
    tensors = [a for a in _flat((args, made)) if isinstance(a, torch.Tensor) and a.device.type != "cpu"]
    if not tensors or name in ALSO_NOTHING or name.startswith(NOTHING) or _is_view(operator):
        return {}
    if name.startswith("aten::_foreach_"):
        return _of_foreach(name, args, made)
    if name.startswith("aten::_fused_"):
        lists = [a for a in args if isinstance(a, list | tuple) and a]
        # the last list has the counts, which are no list of their own to the kernel
        return {cuda: _chunked(lists[0], len(lists) - ("adam" in name), cuda) for cuda in CHUNKS}
    if name in ("aten::stack", "aten::cat"):
        return _each(math.ceil(len(args[0]) / JOINED))
    return _each(1)


def _of_foreach(name: str, args: Sequence[Any], made: Any) -> Launches:
    lists = [list(a) for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], torch.Tensor)]
    numbers = any(isinstance(a, list | tuple) and a and not isinstance(a[0], torch.Tensor) for a in args)
    given = lists[0]
    other = next((a for a in args[1:] if isinstance(a, torch.Tensor)), None)
    if not _is_fast(lists, across_dtypes="_foreach_copy_" in name) or _is_slow_number(other, given):
        return _each(len(given))
    norm = "_foreach_norm" in name or "_foreach_max" in name
    if norm and (given[0].is_complex() or not _has_kernel(args)):
        return _each(len(given))
    # a call that makes new tensors has a list more
    depth = 1 if norm else len(lists) + (not name.endswith("_"))
    # a norm clears its memory, and finishes in a kernel of its own
    more = 1 + math.ceil(len(given) / NORMS) if norm else 0
    return {cuda: _chunked(given, depth, cuda, numbers=numbers) + more for cuda in CHUNKS}


def _chunked(tensors: Sequence[torch.Tensor], depth: int, cuda: int, *, numbers: bool = False) -> int:
    """Return after how many launches all chunks of the tensors are done."""
    most = (TENSORS_WITH_NUMBERS if numbers else TENSORS)[cuda][depth - 1]
    launches = held = chunks = 0
    for tensor in tensors:
        left = math.ceil(int(tensor.numel()) / CHUNK)
        held += left > 0
        while left:
            taken = min(left, CHUNKS[cuda] - chunks)
            left, chunks = left - taken, chunks + taken
            if chunks == CHUNKS[cuda] or (not left and held == most):
                # a tensor that is not done is in the next launch too
                launches, chunks, held = launches + 1, 0, int(left > 0)
    return launches + (chunks > 0)


def _is_fast(lists: Sequence[Sequence[torch.Tensor]], *, across_dtypes: bool) -> bool:
    """Return whether torch takes the lists together: alike in device, dtype, sizes and strides, without gaps."""
    first = lists[0][0]
    for each in lists:
        dtype = each[0].dtype if across_dtypes else first.dtype
        if any(t.dtype != dtype or t.device != first.device or t.layout != torch.strided for t in each):
            return False
        if not all(map(_is_dense, each)):
            return False
    return all(_alike(a, b) for other in lists[1:] for a, b in zip(lists[0], other, strict=True))


def _is_dense(tensor: torch.Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    strides = zip(a.shape, a.stride(), b.stride(), strict=False)
    return a.shape == b.shape and all(left == right for size, left, right in strides if size != 1)


def _is_slow_number(number: torch.Tensor | None, tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether a 0-dim tensor with which all are multiplied has another dtype."""
    return number is not None and number.device.type != "cpu" and number.dtype != tensors[0].dtype


def _has_kernel(args: Sequence[Any]) -> bool:
    order = args[1] if len(args) > 1 and isinstance(args[1], int | float) else 2
    return order in (1, 2, math.inf)


def _is_view(operator: Any) -> bool:
    """Return whether what an operator returns is memory of what it was given, and nothing is written."""
    aliases = [r.alias_info for r in operator._schema.returns]
    return bool(aliases) and all(a is not None and not a.is_write for a in aliases)


def _each(number: int) -> Launches:
    return dict.fromkeys(CHUNKS, number)


def _flat(values: Any) -> list[Any]:
    if isinstance(values, list | tuple):
        return [leaf for value in values for leaf in _flat(value)]
    return [values]
