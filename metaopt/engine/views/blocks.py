"""Blocks: how lists of tensors are cut into pieces that a processor's cache holds. Touches no tensor."""

import math

import torch

from metaopt.engine.update.change import Params

# elements that a processor's cache holds together with their state
CPU_BLOCK = 1 << 19

# larger blocks on accelerators, half a gigabyte of float32: few launches, bounded temporary memory
DEVICE_BLOCK = 1 << 27

# rows of a tensor's first dimension, or None for all of them
Rows = tuple[int, int] | None


def block_size(params: Params) -> int:
    """Return how many elements to work on at a time: what a processor's cache holds, or costs little device memory."""
    return CPU_BLOCK if params and params[0].device.type == "cpu" else DEVICE_BLOCK


def blocks_of(params: Params, most: int | None = None) -> list[Params]:
    """Return the parameters in blocks of at most so many elements together; a larger one is a block of its own."""
    most = most or block_size(params)
    blocks: list[Params] = []
    filled = math.inf
    for p in params:
        size = p.numel()  # of all shards: ranks cut alike, and reduce alike
        if filled + size > most:
            blocks.append([])
            filled = 0
        blocks[-1].append(p)
        filled += size
    return blocks


def row_ranges(tensor: torch.Tensor, most: int) -> list[tuple[Rows, int]]:
    """Return ranges of rows of at most so many elements each, with these numbers; None is the whole tensor."""
    size = tensor.numel()
    if size <= most or tensor.dim() == 0:
        return [(None, size)]
    length = tensor.shape[0]
    row = size // length
    step = max(1, most // row)
    cuts = [(begin, min(begin + step, length)) for begin in range(0, length, step)]
    return [((begin, end), row * (end - begin)) for begin, end in cuts]
