"""A batch of a problem, dealt over ranks and in another dtype: whatever tensors it consists of."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from metaopt.errors import ProblemError


def mapped(batch: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a batch with each tensor changed; tuples, lists and dicts keep their kind."""
    if isinstance(batch, torch.Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return type(batch)({key: mapped(value, change) for key, value in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(mapped(value, change) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(mapped(value, change) for value in batch)
    return batch


def cast(batch: Any, dtype: torch.dtype | None) -> Any:
    """Return a batch with its real numbers in a dtype; None leaves them as they are."""
    if dtype is None:
        return batch
    return mapped(batch, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def dealt(batch: Any, rank: int, ranks: int, problem: str) -> Any:
    """Return the part of a batch that one of `ranks` ranks trains on: equal pieces along the first dimension.

    Raises ProblemError, the same on all ranks, for a batch that cannot be cut so.
    """
    size = examples(batch, problem)
    if size % ranks:
        raise ProblemError(
            f"a batch of {problem} has {size} examples, which {ranks} ranks cannot share evenly: "
            f"choose a batch size that {ranks} divides, or another number of ranks"
        )
    return part(batch, rank * size // ranks, (rank + 1) * size // ranks)


def part(batch: Any, first: int, end: int) -> Any:
    """Return the examples from `first` to before `end`."""
    return mapped(batch, lambda tensor: tensor[first:end] if tensor.dim() else tensor)


def examples(batch: Any, problem: str) -> int:
    """Return how many examples a batch holds. Raises ProblemError where its tensors disagree, or there is none."""
    sizes = {len(tensor) for tensor in tensors(batch) if tensor.dim()}
    if len(sizes) != 1:
        what = f"tensors of {', '.join(map(str, sorted(sizes)))} rows" if sizes else f"{type(batch).__name__}"
        raise ProblemError(
            f"a batch of {problem} cannot be dealt over ranks: expected tensors with one row for each example, "
            f"got {what}. Train it with one process"
        )
    return sizes.pop()


def tensors(batch: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a batch in their order."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors(value)
