"""Numbers of many tensors in a few launches: on an accelerator the tensors are pieces of one memory, cut in chunks.

A tensor begins where a chunk begins, and zeros fill its last one. So all chunks are added up by one call, those of each
tensor by a second; and what each tensor is multiplied by is looked up for all chunks at once. On a processor one tensor
is done after the other.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from operator import mul
from typing import NamedTuple

import torch

from metaopt.multi_tensor import Tensors, at_least_float32, cast, on_accelerator

CHUNK = 512
# elements of which copies are made at a time
PART = 1 << 27


class Layout(NamedTuple):
    """Where tensors lie in one memory, and on the device: whose each chunk is, and which chunk is the first of each."""

    begins: list[int]
    total: int
    owners: torch.Tensor
    first_chunks: torch.Tensor


@lru_cache(maxsize=64)
def _layout(sizes: tuple[int, ...], device: torch.device) -> Layout:
    counts = [-(-size // CHUNK) for size in sizes]
    firsts = [0, *accumulate(counts)]
    numbers = torch.arange(len(counts), device="cpu")
    owners = numbers.repeat_interleave(torch.tensor(counts, device="cpu"), output_size=firsts[-1])
    begins = [first * CHUNK for first in firsts[:-1]]
    of_device = [t.to(device, non_blocking=True) for t in (owners, torch.tensor(firsts, device="cpu"))]
    return Layout(begins, firsts[-1] * CHUNK, *of_device)


def forget_layouts() -> None:
    """Free what is kept of layouts on devices."""
    _layout.cache_clear()


def layout_of(tensors: Sequence[torch.Tensor]) -> Layout:
    """Return the layout of tensors."""
    return _layout(tuple(map(torch.Tensor.numel, tensors)), tensors[0].device)


def flat_room(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> Tensors:
    """Return room of the shapes of tensors as pieces of one memory, zeros behind each."""
    return _pieces(torch.zeros(layout_of(tensors).total, dtype=dtype, device=tensors[0].device), tensors)


def _pieces(memory: torch.Tensor, tensors: Sequence[torch.Tensor]) -> Tensors:
    begins = layout_of(tensors).begins
    return [memory.as_strided(t.shape, _strides(t.shape), begin) for begin, t in zip(begins, tensors, strict=True)]


@lru_cache(maxsize=512)
def _strides(shape: torch.Size) -> tuple[int, ...]:
    return tuple(accumulate((1, *reversed(shape[1:])), mul))[::-1] if shape else ()


def memory_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return the memory whose pieces tensors are, or None."""
    memory, layout = tensors[0]._base, layout_of(tensors)
    if memory is None or memory.dim() != 1 or memory.numel() != layout.total:
        return None
    if any(t._base is not memory or not t.is_contiguous() for t in tensors):
        return None
    return memory if [t.storage_offset() for t in tensors] == layout.begins else None


def _gathered(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return the memory of copies of tensors."""
    pieces = flat_room(tensors, dtype)
    torch._foreach_copy_(pieces, list(tensors))
    memory = pieces[0]._base
    assert memory is not None
    return memory


def parts_of(*lists: Sequence[torch.Tensor]) -> Iterator[tuple[Tensors, ...]]:
    """Yield aligned lists in parts of so many elements that copies of them take bounded memory."""
    begin = filled = 0
    for end, tensor in enumerate(lists[0]):
        if filled and filled + tensor.numel() > PART:
            yield tuple(list(each[begin:end]) for each in lists)
            begin, filled = end, 0
        filled += tensor.numel()
    if lists[0]:
        yield tuple(list(each[begin:]) for each in lists)


# ---- what parts ask for


def sums(tensors: Sequence[torch.Tensor]) -> Tensors:
    """Return the sum of each tensor on an accelerator, in float32 at least."""
    found: Tensors = []
    for (part,) in parts_of(tensors):
        memory, wide = memory_of(part), at_least_float32(part[0].dtype)
        found += _sums(_gathered(part, wide) if memory is None else memory, part).unbind()
    return found


def dots(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> Tensors:
    """Return the real inner product of each two tensors on an accelerator, in float32 at least."""
    a, b = ([torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in each] for each in (a, b))
    found: Tensors = []
    for left, right in parts_of(a, b):
        wide = at_least_float32(torch.promote_types(left[0].dtype, right[0].dtype))
        memory, other = memory_of(left), memory_of(right)
        if memory is not None and other is not None:
            products = memory.to(wide) * other
        else:
            products = _gathered(left, wide)
            torch._foreach_mul_(_pieces(products, left), cast(right, wide))
        found += _sums(products, left).unbind()
    return found


def _sums(memory: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    of_chunks = memory.view(-1, CHUNK).sum(dim=1, dtype=at_least_float32(memory.dtype))
    return torch.segment_reduce(of_chunks, "sum", offsets=layout_of(tensors).first_chunks, unsafe=True)


def multiply_(tensors: Sequence[torch.Tensor], numbers: torch.Tensor) -> None:
    """Multiply each tensor in place by its own number."""
    if not on_accelerator(tensors):
        torch._foreach_mul_(list(tensors), list(numbers.unbind()))
        return
    begin = 0
    for (part,) in parts_of(tensors):
        memory, own = memory_of(part), numbers[begin : begin + len(part)]
        copied = _gathered(part, part[0].dtype) if memory is None else memory
        copied.view(-1, CHUNK).mul_(own.index_select(0, layout_of(part).owners).unsqueeze(1))
        if memory is None:
            torch._foreach_copy_(part, _pieces(copied, part))
        begin += len(part)


def multiples(tensors: Tensors, numbers: torch.Tensor) -> Tensors:
    """Return each tensor times its own number."""
    if not on_accelerator(tensors):
        return list(torch._foreach_mul(tensors, list(numbers.to(tensors[0].dtype).unbind())))
    made = flat_room(tensors, tensors[0].dtype)
    torch._foreach_copy_(made, tensors)
    multiply_(made, numbers)
    return made


def add_multiples_(tensors: Tensors, others: Tensors, numbers: torch.Tensor) -> None:
    """Add other tensors in place, each times its own number."""
    if not on_accelerator(tensors):
        torch._foreach_addcmul_(tensors, others, list(numbers.unbind()))
        return
    begin = 0
    for part, terms in parts_of(tensors, others):
        layout, dtype = layout_of(part), part[0].dtype
        memory, copied = memory_of(part), _gathered(terms, dtype)
        multiples = copied.view(-1, CHUNK)
        multiples.mul_(numbers[begin : begin + len(part)].index_select(0, layout.owners).unsqueeze(1))
        if memory is None:
            torch._foreach_add_(part, _pieces(copied, part))
        else:
            memory.add_(copied)
        begin += len(part)
