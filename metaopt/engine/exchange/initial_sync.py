"""The first step of replicas: they agree on model, settings and weights, and one that is late takes the others'."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from metaopt.distributed.shards import holders_of_other_shards, local
from metaopt.engine.chain import Chain
from metaopt.engine.exchange.buckets import exchanged_params
from metaopt.engine.run.entries import STEP_CALLS, TEMPLATE
from metaopt.engine.run.run import Run
from metaopt.errors import StepError

# elements of a tensor that are looked at together
DIGESTED = 1 << 22


@dataclass
class Comparison:
    """How far the replicas of a run are: by rank of the group, those that are behind, and those of other weights."""

    source: int  # the first of those that have made the most steps
    steps: int
    updates: int
    behind: list[int]
    differing: list[int]


@torch.no_grad()
def compared(run: Run) -> Comparison | None:
    """Compare model, settings and weights of all replicas; None if there is one. Raises StepError for what differs."""
    replicas = run.replicas
    _refuse_other_shards(run)
    if replicas.size == 1:
        return None
    steps, device = int(run.param_groups[0].get(STEP_CALLS, 0)), _device(run)
    own = [_model(run), _settings(run), steps, run.updates, _weights(run)]
    told = replicas.gather(own, device)
    for place, what in enumerate(("parameters (names, shapes, dtypes or groups)", "settings of the exchange")):
        other = [rank for rank, numbers in enumerate(told) if numbers[place] != told[0][place]]
        if other:
            raise StepError(
                f"replicas 0 and {other[0]} have different {what}: build the same stack over the same model on all"
            )
    most = max(numbers[2] for numbers in told)
    ahead = [rank for rank, numbers in enumerate(told) if numbers[2] == most]
    source = told[ahead[0]]
    differs = [rank for rank in ahead if told[rank][4] != source[4]]
    if most and differs:
        raise StepError(
            f"replicas {ahead[0]} and {differs[0]} have made {most} steps and keep different outer weights: load "
            f"checkpoints of one run, from one moment, on all replicas"
        )
    behind = [rank for rank in range(len(told)) if rank not in ahead]
    return Comparison(ahead[0], most, source[3], behind, differs)


@torch.no_grad()
def take_weights(run: Run, found: Comparison) -> bool:
    """Send weights to the replicas that are behind, or have others; return whether weights changed here."""
    rank = run.replicas.rank
    if found.behind:
        _take_outer_weights(run, found.source, found.steps, found.updates, is_new=rank in found.behind)
        return rank in found.behind
    if not found.differing:
        return False
    run.replicas.broadcast([local(p.detach()) for group in run.param_groups for p in group["params"]], found.source)
    return rank in found.differing


def _take_outer_weights(run: Run, source: int, steps: int, updates: int, *, is_new: bool) -> None:
    """Send the outer weights of one replica, and what goes with them, to those that have made fewer steps."""
    covered: dict[torch.Tensor, torch.Tensor] = {}
    if is_new:
        for group in run.param_groups:
            group[TEMPLATE] = ""
            for p in group["params"]:
                run.state.pop(p, None)
        run.invalidate()
    sent: list[torch.Tensor] = []
    for placed in run.structure.exchanges:
        for group, members in exchanged_params(run, placed):
            for p in members:
                keys = run.structure.chain_of(group).slots_of(placed.wrapper).state_keys
                sent += [local(run.state[p][key]) for key in keys]
                # the innermost wrapper has made the last outer step
                covered.setdefault(p, local(run.state[p][f"{placed.wrapper.label}.{placed.wrapper.anchor_across}"]))
    every = [p for group in run.param_groups for p in group["params"]]
    sent += [local(p.detach()) for p in every if p not in covered]
    on_device = [tensor.to(every[0].device) for tensor in sent] if every else []
    run.replicas.broadcast(on_device, source)
    if not is_new:
        return
    for kept, came in zip(sent, on_device, strict=True):
        if kept is not came:
            kept.copy_(came)
    for p, anchor in covered.items():
        local(p.detach()).copy_(anchor)
    for group in run.param_groups:
        group[STEP_CALLS] = steps
    run.count_from(updates)


def _refuse_other_shards(run: Run) -> None:
    replicas = set(run.replicas.ranks()) if run.replicas.size > 1 else set()
    for group in run.param_groups if replicas else ():
        for p in group["params"]:
            if replicas & holders_of_other_shards(p):
                raise StepError(
                    f"parameters are sharded over ranks that the replicas {sorted(replicas)} include: a mean over "
                    f"these would mix different shards. Give build(..., replicas=mesh['NAME']), the dimension of a "
                    f"device mesh along which whole copies of the model are"
                )


def _model(run: Run) -> int:
    names = run.names()
    return _number(
        (names[p], tuple(local(p).shape), str(p.dtype), p.requires_grad)
        for group in run.param_groups
        for p in group["params"]
    )


def _settings(run: Run) -> int:
    found = []
    for placed in run.structure.exchanges:
        wrapper = placed.wrapper
        for group in run.groups_of(placed):
            scheduled = run.schedules_of(group)
            keys = [f"{wrapper.label}.{name}" for name in wrapper.hyperparameters]
            found.append([(key, group[key]) for key in keys if key not in scheduled])
    return _number((steps_per_round(run), *found))


def _weights(run: Run) -> int:
    """Return a number for the outer weights, or before the first step for the weights."""
    keys: dict[Chain, list[str]] = {}
    for placed in run.structure.exchanges if run.param_groups[0].get(STEP_CALLS, 0) else ():
        for chain in run.structure.chains_of(placed):
            keys.setdefault(chain, []).append(f"{placed.wrapper.label}.{placed.wrapper.anchor_across}")
    found: list[torch.Tensor] = []
    for group in run.param_groups:
        for p in group["params"]:
            wanted = keys.get(run.structure.chain_of(group), ())
            held = run.state.get(p, {})
            found += [local(held[key]) for key in wanted if key in held]
            found += [] if any(key in held for key in wanted) or keys else [local(p.detach())]
    return _number(_digest(tensor) for tensor in found)


def steps_per_round(run: Run) -> int:
    """Return how many calls of `step()` make one update, with wrappers that gather several."""
    group, each = run.param_groups[0], 1
    for wrapper in run.structure.wrappers:
        if wrapper.spans_steps:
            each *= int(group[f"{wrapper.label}.{wrapper.spans_steps}"])
    return each


def _number(values: Iterable[Any]) -> int:
    """Return a number of 63 bits for some values: for the same ones the same number, in every process."""
    return int.from_bytes(hashlib.blake2b(repr(list(values)).encode(), digest_size=8).digest(), "little") >> 1


def _digest(tensor: torch.Tensor) -> int:
    """Return a number for the bits of a tensor; reads it from its device."""
    if not tensor.numel():
        return 0
    numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = numbers.contiguous().view(kinds[numbers.element_size()]).reshape(-1)
    # in pieces: 64 bits for each of many elements would be more than the weights
    places = torch.arange(1, min(bits.numel(), DIGESTED) + 1, device=bits.device)
    sums = [(piece * places[: piece.numel()]).sum() for piece in torch.split(bits, DIGESTED)]
    return _number(torch.stack(sums).tolist())


def _device(run: Run) -> torch.device:
    """Return where the first parameter is; the first group may be empty."""
    first = next((p for group in run.param_groups for p in group["params"]), None)
    return torch.device("cpu") if first is None else first.device
