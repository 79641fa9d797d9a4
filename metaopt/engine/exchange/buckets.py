"""What of the parameters is exchanged: chunks of them in buckets, which are the same on all replicas.

Wrappers' state is made here for parameters that have had no update yet: they may have had one elsewhere.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from metaopt.distributed import replicas
from metaopt.distributed.replicas import Sum, in_buckets
from metaopt.distributed.shards import local
from metaopt.engine.chain import ParamGroup
from metaopt.engine.param_state.first_update import add_state_of
from metaopt.engine.param_state.placeholders import remove_placeholders
from metaopt.engine.param_state.slot_values import slot_dtype
from metaopt.engine.run.entries import TEMPLATE
from metaopt.engine.run.run import Run
from metaopt.engine.structure import PlacedWrapper
from metaopt.engine.update.change import Params
from metaopt.engine.update.update import Update
from metaopt.engine.views.blocks import Rows, row_ranges
from metaopt.engine.views.cutting import views_of
from metaopt.engine.views.group_view import GroupView
from metaopt.engine.views.params import is_trained
from metaopt.multi_tensor import at_least_float32
from metaopt.wrapper import Wrapper


@dataclass
class Chunk:
    """A parameter, or rows of it, in a bucket."""

    group: ParamGroup
    parameter: torch.Tensor
    rows: Rows

    @property
    def shape(self) -> torch.Size:
        whole = local(self.parameter)
        return whole.shape if self.rows is None else whole[self.rows[0] : self.rows[1]].shape


@dataclass
class Bucket:
    """Chunks whose displacements are added up in one collective."""

    chunks: list[Chunk]
    sum: Sum | None = None
    # a checkpoint that was taken on the way holds the means
    is_saved: bool = False

    def means(self) -> list[torch.Tensor]:
        """Return the mean displacement of each chunk; waits for the collective."""
        assert self.sum is not None
        sizes = [chunk.shape.numel() for chunk in self.chunks]
        pieces = torch.split(self.sum.mean(), sizes)
        return [piece.view(chunk.shape) for piece, chunk in zip(pieces, self.chunks, strict=True)]


def exchanged_params(run: Run, placed: PlacedWrapper) -> list[tuple[ParamGroup, Params]]:
    """Return the parameters that are exchanged, the same on all replicas; make the wrapper's state of those without.

    A parameter that has no gradient here may have had one elsewhere.
    """
    if any(group[TEMPLATE] for group in run.param_groups):
        remove_placeholders(run, keep_early=True)
    found = []
    for group in run.groups_of(placed):
        members = [p for p in group["params"] if is_trained(p)]
        if run.replicas.size == 1:
            members = [p for p in members if p in run.state]
        add_state_of(run, run.structure.chain_of(group), placed.wrapper, members)
        found.append((group, members))
    return found


def buckets_of_fragment(run: Run, placed: PlacedWrapper, number: int) -> list[Bucket]:
    """Return the chunks of one fragment in buckets, which depend only on groups and shapes."""
    wrapper, slot = placed.wrapper, placed.wrapper.slots[str(placed.wrapper.anchor_across)]
    members = [(group, p) for group, params in exchanged_params(run, placed) for p in params]
    chunks: list[Chunk] = []
    sizes: list[tuple[Any, int]] = []
    for group, p in _fragment(members, number, int(vars(wrapper)["fragments"])):
        dtype = at_least_float32(slot_dtype(slot, vars(wrapper), p))
        whole = run.structure.chain_of(group).slots_of(wrapper).keeps_moments
        cuts = [(None, local(p).numel())] if whole else row_ranges(local(p), replicas.BUCKET // dtype.itemsize)
        chunks += [Chunk(group, p, rows) for rows, _ in cuts]
        sizes += [((dtype, p.device), size * dtype.itemsize) for _, size in cuts]
    return [Bucket([chunks[i] for i in positions]) for positions in in_buckets(sizes)]


def _fragment(members: list[tuple[ParamGroup, torch.Tensor]], number: int, fragments: int) -> Iterable[Any]:
    """Yield the members of one of several contiguous fragments of about the same size."""
    sizes = [local(p).numel() for _, p in members]
    total, before = sum(sizes), 0
    for member, size in zip(members, sizes, strict=True):
        # a parameter belongs to the fragment in which its middle is
        if min(fragments - 1, (2 * before + size) * fragments // max(1, 2 * total)) == number:
            yield member
        before += size


def displacements_in_one_tensor(update: Update, wrapper: Wrapper, chunks: list[Chunk]) -> torch.Tensor:
    """Return the displacements of all chunks in one tensor, in the dtype in which they are sent."""
    sizes = [chunk.shape.numel() for chunk in chunks]
    flat: torch.Tensor | None = None
    pieces: tuple[torch.Tensor, ...] = ()
    for view, positions in views_of_chunks(update, wrapper, chunks):
        anchors = getattr(view, str(wrapper.anchor_across))
        for i, weights, anchor in zip(positions, view.params, anchors, strict=True):
            wide = at_least_float32(anchor.dtype)
            if flat is None:
                compressed = vars(wrapper)["compress"] is not None and not wide.is_complex
                flat = torch.empty(sum(sizes), dtype=torch.bfloat16 if compressed else wide, device=weights.device)
                pieces = torch.split(flat, sizes)
            pieces[i].view(anchor.shape).copy_(weights.to(wide) - anchor)
    assert flat is not None
    return flat


def views_of_chunks(update: Update, wrapper: Wrapper, chunks: list[Chunk]) -> Iterator[tuple[GroupView, list[int]]]:
    """Yield views of the chunks of each group, with the positions of their tensors among the chunks."""
    groups: dict[int, tuple[ParamGroup, list[int]]] = {}
    for i, chunk in enumerate(chunks):
        groups.setdefault(id(chunk.group), (chunk.group, []))[1].append(i)
    for group, positions in groups.values():
        chosen = [chunks[i] for i in positions]
        params = [chunk.parameter for chunk in chosen]
        if any(chunk.rows is not None for chunk in chosen):
            yield GroupView(update, group, wrapper, params, [chunk.rows for chunk in chosen], positions), positions
            continue
        at = {id(p): i for p, i in zip(params, positions, strict=True)}
        for view in views_of(update, group, wrapper, params):
            yield view, [at[id(p)] for p in view.parameters]
