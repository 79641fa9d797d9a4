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
# an attribute of memories that are made here, with zeros behind each tensor
MARK = "_metaopt_is_flat_memory"
# elements of which copies are made at a time
PART = 1 << 27
# devices for which torch has `segment_reduce`, which adds up in the same order each time
ADDING_SEGMENTS = ("cpu", "cuda")


class Layout(NamedTuple):
    """Where tensors lie in one memory, and on the device: whose each chunk is."""

    begins: list[int]
    total: int
    owners: torch.Tensor


@lru_cache(maxsize=64)
def _layout(sizes: tuple[int, ...], device: torch.device) -> Layout:
    counts = [-(-size // CHUNK) for size in sizes]
    firsts = [0, *accumulate(counts)]
    numbers = torch.arange(len(counts), device="cpu")
    owners = numbers.repeat_interleave(torch.tensor(counts, device="cpu"), output_size=firsts[-1])
    begins = [first * CHUNK for first in firsts[:-1]]
    return Layout(begins, firsts[-1] * CHUNK, owners.to(device, non_blocking=True))


@lru_cache(maxsize=64)
def _first_chunks(sizes: tuple[int, ...], device: torch.device, times: int) -> torch.Tensor:
    """Return where tensors begin among the chunks of several memories, one behind the other."""
    counts = [-(-size // CHUNK) for size in sizes]
    return torch.tensor([0, *accumulate(counts * times)], device="cpu").to(device, non_blocking=True)


@lru_cache(maxsize=64)
def _padding(sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return the places behind tensors."""
    begins = _layout(sizes, device).begins
    behind = [range(begin + size, begin + size + -size % CHUNK) for begin, size in zip(begins, sizes, strict=True)]
    places = torch.tensor([place for each in behind for place in each], dtype=torch.long, device="cpu")
    return places.to(device, non_blocking=True)


@lru_cache(maxsize=64)
def numbers_on(numbers: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return numbers as a tensor on a device, which is kept."""
    return torch.tensor(numbers, dtype=dtype, device="cpu").to(device, non_blocking=True)


@lru_cache(maxsize=64)
def number_on(number: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a number as a tensor on a device, which is kept."""
    return torch.full((), number, dtype=dtype, device=device)


def forget_layouts() -> None:
    """Free what is kept of layouts on devices."""
    for kept in (_layout, _first_chunks, _padding, numbers_on, number_on):
        kept.cache_clear()


def _sizes(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    return tuple(map(torch.Tensor.numel, tensors))


def layout_of(tensors: Sequence[torch.Tensor]) -> Layout:
    """Return the layout of tensors."""
    return _layout(_sizes(tensors), tensors[0].device)


def _memories(tensors: Sequence[torch.Tensor], dtype: torch.dtype, number: int) -> Tensors:
    """Return several memories for tensors, cleared by one call: they are freed together."""
    whole = torch.zeros(number, layout_of(tensors).total, dtype=dtype, device=tensors[0].device)
    # `data` drops the base, so that each memory is the base of its own pieces
    memories = [memory.data for memory in whole.unbind()]
    for memory in memories:
        setattr(memory, MARK, True)
    return memories


def flat_rooms(tensors: Sequence[torch.Tensor], dtype: torch.dtype, number: int) -> list[Tensors]:
    """Return several rooms of the shapes of tensors, each as pieces of one memory, zeros behind each piece."""
    return [pieces(memory, tensors) for memory in _memories(tensors, dtype, number)]


def flat_room(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> Tensors:
    """Return room of the shapes of tensors as pieces of one memory, zeros behind each."""
    return flat_rooms(tensors, dtype, 1)[0]


def pieces(memory: torch.Tensor, tensors: Sequence[torch.Tensor]) -> Tensors:
    """Return the pieces of a memory that lie as tensors of these shapes."""
    offset, begins = memory.storage_offset(), layout_of(tensors).begins
    placed = zip(begins, tensors, strict=True)
    return [memory.as_strided(t.shape, _strides(t.shape), offset + begin) for begin, t in placed]


@lru_cache(maxsize=512)
def _strides(shape: torch.Size) -> tuple[int, ...]:
    return tuple(accumulate((1, *reversed(shape[1:])), mul))[::-1] if shape else ()


def memory_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return the memory that was made for these tensors as its pieces, or None."""
    memory, layout = tensors[0]._base, layout_of(tensors)
    # of another memory nobody knows what lies behind a tensor
    if memory is None or not hasattr(memory, MARK) or memory.numel() != layout.total:
        return None
    if any(t._base is not memory or not t.is_contiguous() for t in tensors):
        return None
    offset = memory.storage_offset()
    return memory if [t.storage_offset() - offset for t in tensors] == layout.begins else None


def gathered(lists: Sequence[Sequence[torch.Tensor]], dtype: torch.dtype) -> Tensors:
    """Return the memories of copies of aligned lists, made by two calls for all of them."""
    memories = _memories(lists[0], dtype, len(lists))
    placed = [piece for memory in memories for piece in pieces(memory, lists[0])]
    torch._foreach_copy_(placed, [tensor for each in lists for tensor in each])
    return memories


def _gathered(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return the memory of copies of tensors."""
    return gathered([tensors], dtype)[0]


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
            torch._foreach_mul_(pieces(products, left), cast(right, wide))
        found += _sums(products, left).unbind()
    return found


def _sums(memory: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    of_chunks = memory.view(-1, CHUNK).sum(dim=1, dtype=at_least_float32(memory.dtype))
    return sums_of_chunks(of_chunks.unsqueeze(0), tensors)[0]


def sums_of_chunks(of_chunks: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return rows of numbers of chunks added up to rows of numbers of tensors, by one call."""
    times = len(of_chunks)
    if of_chunks.device.type not in ADDING_SEGMENTS:
        totals = of_chunks.new_zeros(times, len(tensors))
        return totals.index_add_(1, layout_of(tensors).owners, of_chunks)
    # one row behind the other: with two dimensions torch adds up each segment by a single thread
    offsets = _first_chunks(_sizes(tensors), of_chunks.device, times)
    return torch.segment_reduce(of_chunks.view(-1), "sum", offsets=offsets, unsafe=True).view(times, -1)


def clear_behind_(memory: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """Set what is behind tensors in their memory to zeros again."""
    memory.view(-1).index_fill_(0, _padding(_sizes(tensors), memory.device), 0.0)


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
            torch._foreach_copy_(part, pieces(copied, part))
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
            torch._foreach_add_(part, pieces(copied, part))
        else:
            memory.add_(copied)
        begin += len(part)
