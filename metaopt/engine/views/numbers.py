"""What a wrapper computes over the tensors of a group, shards and replicas included: norms, means, dots, noise."""

from typing import Any, Literal

import torch

from metaopt.distributed.shards import (
    dots_over_shards,
    local,
    mean_over_shards,
    means_over_shards,
    norm_over_shards,
    norms_over_shards,
    random_like,
    sums_over_shards,
)
from metaopt.engine.chain import ParamGroup
from metaopt.engine.update.change import Params
from metaopt.engine.update.update import Update
from metaopt.engine.views.blocks import Rows as RowRange
from metaopt.engine.views.rows import all_rows
from metaopt.errors import StepError
from metaopt.flat_memory import add_multiples_, multiples, multiply_
from metaopt.group import Group, Rows
from metaopt.multi_tensor import stacked
from metaopt.wrapper import Wrapper


class GroupNumbers(Group):
    """The part of a view that computes: it reads the tensors that it is given, and the places of their shards."""

    _update: Update
    _group: ParamGroup
    _wrapper: Wrapper
    _rows: list[RowRange] | None
    parameters: Params

    def norms(self, tensors: list[torch.Tensor], *, rows: bool = False) -> list[torch.Tensor]:
        if not rows:
            return norms_over_shards(tensors, self.parameters)
        return [norm_over_shards(t, p, rows=rows) for t, p in zip(tensors, self.parameters, strict=True)]

    def means(self, tensors: list[torch.Tensor], *, rows: bool = False) -> list[torch.Tensor]:
        if not rows:
            return means_over_shards(tensors, self.parameters)
        return [mean_over_shards(t, p, rows=rows) for t, p in zip(tensors, self.parameters, strict=True)]

    def rows_of(self, tensors: list[torch.Tensor]) -> Rows:
        return all_rows(tensors, self.parameters)

    def stack(self, numbers: list[torch.Tensor]) -> torch.Tensor:
        return stacked(numbers)

    def multiply(self, tensors: list[torch.Tensor], numbers: torch.Tensor) -> None:
        multiply_(tensors, numbers)

    def multiples(self, tensors: list[torch.Tensor], numbers: torch.Tensor) -> list[torch.Tensor]:
        return multiples(tensors, numbers)

    def add_multiples(self, tensors: list[torch.Tensor], others: list[torch.Tensor], numbers: torch.Tensor) -> None:
        add_multiples_(tensors, others, numbers)

    def sum_over_shards(self, numbers: list[torch.Tensor]) -> list[torch.Tensor]:
        return sums_over_shards(numbers, self.parameters)

    def dots(self, a: list[torch.Tensor], b: list[torch.Tensor]) -> list[torch.Tensor]:
        return dots_over_shards(a, b, self.parameters)

    def random_like(self, tensors: Any, distribution: Literal["normal", "uniform"] = "normal") -> Any:
        if isinstance(tensors, torch.Tensor):
            return self._noise(self._index_of(tensors), tensors, distribution)
        return [self._noise(i, tensor, distribution) for i, tensor in enumerate(tensors)]

    def _noise(self, i: int, values: torch.Tensor, distribution: str) -> torch.Tensor:
        update, wrapper, parameter = self._update, self._wrapper, self.parameters[i]
        update.param_names = update.param_names or update.run.names()
        rows = None if self._rows is None else self._rows[i]
        place = wrapper.label, id(parameter), rows
        draw = update.random_draws[place] = update.random_draws.get(place, 0) + 1
        seed = self._group.get(f"{wrapper.label}.seed", 0)
        key = f"{seed}/{wrapper.label}/{update.updates_before}/{update.param_names[parameter]}/{draw}"
        if rows is None or values.shape != self.params[i].shape:
            return random_like(values, parameter, key, distribution)
        # a block of rows gets its rows of the noise of the whole tensor
        whole = torch.empty_like(local(parameter), dtype=values.dtype)
        return random_like(whole, parameter, key, distribution)[rows[0] : rows[1]]

    def _index_of(self, tensor: torch.Tensor) -> int:
        lists: list[list[torch.Tensor | None]] = [
            list(self.params),
            [p.grad for p in self.parameters],
            [self._update.change.added.get(p) for p in self.parameters],
        ]
        for candidates in lists:
            for i, candidate in enumerate(candidates):
                if candidate is not None and (candidate is tensor or local(candidate).data_ptr() == tensor.data_ptr()):
                    return i
        raise StepError(
            f"{self._wrapper.label}: random_like takes a tensor of group.params, group.grads or group.update, or a "
            f"list aligned with group.params"
        )

    def push(self, name: str, value: torch.Tensor) -> None:
        push(getattr(self, name), value)

    @property
    def num_replicas(self) -> int:
        return self._update.run.replicas.size

    def mean_over_replicas(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return self._update.run.replicas.mean(tensors)


def push(history: torch.Tensor, value: torch.Tensor) -> None:
    """Append a value to a history, whose oldest value goes; never waits for the device."""
    history.copy_(torch.cat([history[1:], value.detach().reshape(1).to(history)]))
