"""Rows of many tensors: those of one length are one matrix on an accelerator, so that a call takes all of them."""

from collections.abc import Sequence

import torch

from metaopt.distributed.shards import is_sharded, mean_over_shards, norm_over_shards
from metaopt.engine.update.change import Params
from metaopt.group import Rows
from metaopt.multi_tensor import at_least_float32, on_accelerator, room_for


def all_rows(tensors: list[torch.Tensor], parameters: Params) -> Rows:
    """Return the rows of tensors like some parameters."""
    if on_accelerator(tensors) and not any(map(is_sharded, parameters)) and not any(t.is_complex() for t in tensors):
        return _Matrices(tensors)
    return _OneByOne(tensors, parameters)


class _OneByOne(Rows):
    """One tensor after the other: on a processor, and where rows are spread over shards."""

    def __init__(self, tensors: list[torch.Tensor], parameters: Params) -> None:
        self._tensors, self._parameters = tensors, parameters
        self._shapes: list[torch.Size] = []

    def _joined(self, numbers: Sequence[torch.Tensor]) -> torch.Tensor:
        self._shapes = [n.shape for n in numbers]
        return torch.cat([n.reshape(-1) for n in numbers])

    def norms(self) -> torch.Tensor:
        pairs = zip(self._tensors, self._parameters, strict=True)
        return self._joined([norm_over_shards(t, p, rows=True) for t, p in pairs])

    def means(self) -> torch.Tensor:
        pairs = zip(self._tensors, self._parameters, strict=True)
        return self._joined([mean_over_shards(t, p, rows=True) for t, p in pairs])

    def _of_each(self, numbers: torch.Tensor) -> list[torch.Tensor]:
        parts = torch.split(numbers.to(self._tensors[0].dtype), [shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def multiply(self, numbers: torch.Tensor) -> None:
        torch._foreach_mul_(self._tensors, self._of_each(numbers))

    def subtract(self, numbers: torch.Tensor) -> None:
        torch._foreach_sub_(self._tensors, self._of_each(numbers))


class _Matrices(Rows):
    """Copies of the tensors, sorted by the length of their rows: one matrix for each length."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = sorted(tensors, key=_length)
        self._copies = room_for(self._tensors, tensors[0].dtype)
        torch._foreach_copy_(self._copies, self._tensors)
        memory = self._copies[0]._base if self._copies[0]._base is not None else self._copies[0]
        lengths: dict[int, int] = {}
        for tensor in self._tensors:
            lengths[_length(tensor)] = lengths.get(_length(tensor), 0) + tensor.numel()
        blocks = torch.split(memory, list(lengths.values()))
        self._matrices = [b.view(-1, length) for b, length in zip(blocks, lengths, strict=True) if b.numel()]
        self._counts = [len(matrix) for matrix in self._matrices]

    def _filled(self, compute: str) -> torch.Tensor:
        matrix = self._matrices[0]
        numbers = torch.empty(sum(self._counts), dtype=at_least_float32(matrix.dtype), device=matrix.device)
        for matrix, out in zip(self._matrices, torch.split(numbers, self._counts), strict=True):
            if compute == "norm":
                torch.linalg.vector_norm(matrix, dim=1, dtype=out.dtype, out=out)
            else:
                torch.mean(matrix, dim=1, dtype=out.dtype, out=out)
        return numbers

    def norms(self) -> torch.Tensor:
        return self._filled("norm")

    def means(self) -> torch.Tensor:
        return self._filled("mean")

    def multiply(self, numbers: torch.Tensor) -> None:
        for matrix, own in zip(self._matrices, torch.split(numbers, self._counts), strict=True):
            matrix.mul_(own.unsqueeze(1))
        torch._foreach_copy_(self._tensors, self._copies)

    def subtract(self, numbers: torch.Tensor) -> None:
        for matrix, own in zip(self._matrices, torch.split(numbers, self._counts), strict=True):
            matrix.sub_(own.unsqueeze(1))
        torch._foreach_copy_(self._tensors, self._copies)


def _length(tensor: torch.Tensor) -> int:
    return tensor[0].numel() if tensor.dim() > 1 and len(tensor) else tensor.numel()
