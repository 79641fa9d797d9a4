"""Whether parameters and gradients are what a processor's fused kernels take: each update compares with the one before.

Kernels and norms ask for the same properties of the same tensors. An update looks at them once, by one call of torch.
"""

from collections.abc import Callable
from itertools import repeat
from operator import attrgetter, is_

import torch

from metaopt.distributed.shards import PLAIN
from metaopt.multi_tensor import Tensors
from metaopt.torch_internals import properties_check


def is_uniform(tensors: Tensors, dtype: torch.dtype) -> bool:
    """Return whether all are ordinary dense tensors of one dtype, row by row in the processor's memory."""
    return (
        PLAIN.issuperset(map(type, tensors))
        and all(map(attrgetter("is_cpu"), tensors))
        and all(map(is_, map(attrgetter("dtype"), tensors), repeat(dtype)))
        and all(map(is_, map(attrgetter("layout"), tensors), repeat(torch.strided)))
        and all(map(torch.Tensor.is_contiguous, tensors))
    )


class UniformTensors:
    """Parameters and gradients of a group that were uniform; `have_same` compares those of a later update with them."""

    def __init__(self, params: Tensors, gradients: Tensors) -> None:
        self.dtype = params[0].dtype
        self._number = len(params)
        self._check: Callable[..., bool] | None = properties_check([*params, *gradients])

    def have_same(self, params: Tensors, gradients: Tensors) -> bool:
        """Return whether other parameters and gradients are known to be uniform, too."""
        if self._check is None or not len(params) == len(gradients) == self._number:
            return False
        return self._check(*params, *gradients)


def uniform_dtype(
    known: dict[int, UniformTensors], key: int, params: Tensors, gradients: Tensors
) -> torch.dtype | None:
    """Return the floating dtype of a group whose parameters and gradients are uniform, or None if they are not.

    `known` holds what was found at earlier updates, by group.
    """
    found = known.get(key)
    if found is not None and found.have_same(params, gradients):
        return found.dtype
    known.pop(key, None)
    dtype = params[0].dtype if params else None
    if dtype is None or not (dtype.is_floating_point and is_uniform(params, dtype) and is_uniform(gradients, dtype)):
        return None
    # of other sizes if somebody has given a parameter other memory
    if list(map(torch.Tensor.numel, params)) != list(map(torch.Tensor.numel, gradients)):
        return None
    known[key] = UniformTensors(params, gradients)
    return dtype
