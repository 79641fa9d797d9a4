"""Rules of practice that `metaopt.explain` looks for: weight decay, clips, their order, a missing warm-up."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from metaopt.engine.chain import Chain, ParamGroup
from metaopt.explaining.probing import Character, Characters, acts_in_vain, differs_for_parts
from metaopt.explaining.table import Finding
from metaopt.stack import Stack
from metaopt.wrapper import Wrapper

Optimizer = torch.optim.Optimizer
# what papers use: 1e-5 to 5e-4 with SGD (added to the gradient), 0.01 to 0.3 with AdamW (apart from it)
MOST_OF_SGD = 5e-4
LEAST_OF_ADAMW = 1e-2
# examples per update from which arXiv:1706.02677 and its followers warm up
LARGE_BATCH = 1024


def in_practice(
    optimizer: Optimizer, batch_size: int | None, peaks: Sequence[float | None], characters: Characters
) -> Iterator[Finding]:
    """Find settings that suit another base or another batch; `peaks` are the highest rates of the groups, if known."""
    peak = max((peak for peak in peaks if peak is not None), default=None)
    for chain in chains_of(optimizer):
        entries = chain.groups_in(optimizer.param_groups)
        yield from _decays(chain, entries, characters)
        yield from _two_decays(chain, entries)
    if isinstance(optimizer, Stack):
        yield from _clips(optimizer)
        yield from _orders(optimizer)
    if batch_size is not None and batch_size >= LARGE_BATCH:
        yield from _warm_up(optimizer, batch_size, peak)


def chains_of(optimizer: Optimizer) -> tuple[Chain, ...]:
    """Return the chains of a stack; a plain optimizer is one."""
    return optimizer.chains if isinstance(optimizer, Stack) else (Chain(optimizer),)


def _decays(chain: Chain, entries: list[ParamGroup], characters: Characters) -> Iterator[Finding]:
    told: set[str] = set()
    for entry in entries:
        for key, decay, coupled in _strengths(chain, entry):
            if not decay or MOST_OF_SGD < decay < LEAST_OF_ADAMW:
                continue
            found = characters.of(chain, entry)
            finding = None if found is None else _decay(type(chain.base).__name__, found, key, decay, coupled)
            if finding is not None and finding.reason not in told:
                told.add(finding.reason)
                yield finding


def _strengths(chain: Chain, entry: ParamGroup) -> Iterator[tuple[str, float, bool | None]]:
    """Yield each weight decay of a group: its key, its strength, and whether it is added to the gradient.

    For the base's own that is None: only trying tells.
    """
    yield "weight_decay", number(entry.get("weight_decay")), None
    for key, (wrapper, name) in chain.hyperparameters.items():
        if name == "weight_decay":
            yield key, number(entry.get(key)), "on_gradients" in wrapper.implemented_hooks()


def _decay(base: str, found: Character, key: str, decay: float, coupled: bool | None) -> Finding | None:
    if coupled is None:
        coupled = found.rescales_decay or not found.ignores_scale
    if found.ignores_scale and not coupled and decay <= MOST_OF_SGD:
        return Finding(
            "decay-of-sgd",
            f"{key}={decay:g} is a value for SGD: {base} does not add the decay to the gradient, so this hardly has an "
            f"effect",
            f"0.01 to 0.1 with {base}, or 0 for no decay",
        )
    if found.ignores_scale and coupled and decay >= LEAST_OF_ADAMW:
        return Finding(
            "decay-of-adamw",
            f"{key}={decay:g} is a value for AdamW: here it is added to the gradient, and {base} divides it by the "
            f"gradient's size, so it is strong for small gradients and weak for large ones",
            f"adamw(weight_decay={decay:g}), or decay({decay:g}) before the base; both act apart from the gradient",
        )
    if not found.ignores_scale and decay >= LEAST_OF_ADAMW:
        return Finding(
            "decay-of-adamw",
            f"{key}={decay:g} is a value for AdamW: {base} is used with higher learning rates, and each update takes "
            f"lr * weight_decay of the weights",
            f"1e-5 to 5e-4 with {base}",
        )
    return None


def _clips(stack: Stack) -> Iterator[Finding]:
    for wrapper, chains in _before_bases(stack):
        first = [(chain, next(iter(chain.groups_in(stack.param_groups)), None)) for chain in chains]
        groups = [(chain, entry) for chain, entry in first if entry is not None]
        if groups and all(acts_in_vain(chain, entry, wrapper) for chain, entry in groups):
            bases = " and ".join(dict.fromkeys(type(chain.base).__name__ for chain, _ in groups))
            reason = f"{wrapper.label} has no effect here: {bases} makes the same update for gradients of any size"
            yield Finding("clip-in-vain", reason, "leave it out")


def _two_decays(chain: Chain, entries: list[ParamGroup]) -> Iterator[Finding]:
    """Find several parts that decay the weights of one group; a part that decays something else has other hooks."""
    told: set[str] = set()
    for entry in entries:
        found = {"weight_decay": number(entry.get("weight_decay"))}
        for key, (wrapper, name) in chain.hyperparameters.items():
            if name == "weight_decay" and not wrapper.implemented_hooks() & {"after_updates", "after_update"}:
                found[key] = number(entry.get(key))
        acting = [f"{key}={value:g}" for key, value in found.items() if value]
        if len(acting) < 2 or str(acting) in told:
            continue
        told.add(str(acting))
        base = f" of {type(chain.base).__name__}" if found["weight_decay"] else ""
        yield Finding(
            "decay-twice",
            f"{len(acting)} parts decay the same weights: {acting[0]}{base} and {' and '.join(acting[1:])}",
            "keep one of them and set the other to 0"
            + (", for instance with weight_decay=0.0 in the base" if base else ""),
        )


def _orders(stack: Stack) -> Iterator[Finding]:
    """Find parts that change every gradient of a window before these are summed up, as a clip does."""
    told: set[str] = set()
    for chain in stack.chains:
        before = [wrapper for wrapper in chain.ordered if wrapper.runs_before_base()]
        entry = next(iter(chain.groups_in(stack.param_groups)), None)
        sums = next((i for i, w in enumerate(before) if w.spans_steps), None)
        for wrapper in before[:sums] if sums is not None and entry is not None else ():
            acts = "on_gradients" in wrapper.implemented_hooks() and not wrapper.may_skip_updates
            if acts and wrapper.label not in told and differs_for_parts(entry or {}, wrapper):
                told.add(wrapper.label)
                yield Finding(
                    "acts-before-the-sum",
                    f"{wrapper.label} is written before {before[sums or 0].label}, so it acts on the gradient of every "
                    f"single batch, and not on the gradient of the update",
                    f"write it behind {before[sums or 0].label}, before the base",
                )


def _remembers(wrapper: Wrapper) -> bool:
    """Return whether a wrapper keeps something of gradients before the base has begun."""
    return any(slot.early for slot in wrapper.active_slots().values())


def _before_bases(stack: Stack) -> Iterator[tuple[Wrapper, tuple[Chain, ...]]]:
    """Yield every wrapper on gradients that may be tried by itself, with the chains that it acts on."""
    every = [*stack.wrappers, *(w for chain in stack.chains for w in chain.wrappers if w not in stack.wrappers)]
    for wrapper in every:
        if "on_gradients" in wrapper.implemented_hooks() and not wrapper.may_skip_updates and not _remembers(wrapper):
            yield wrapper, tuple(chain for chain in stack.chains if wrapper in chain.ordered)


def _warm_up(optimizer: Optimizer, batch_size: int, peak: float | None) -> Iterator[Finding]:
    stack = optimizer if isinstance(optimizer, Stack) else None
    begun = bool(optimizer.state) if stack is None else stack.updates > 0
    if begun:
        return
    for entry in optimizer.param_groups:
        if stack is not None and "lr" in stack.schedules_of(entry) and peak is None:
            return  # how far the rate will rise is not known before the length of the run is
        # torch's OneCycleLR and the warm-ups made of LambdaLR or LinearLR say where they go
        highest = max(number(entry.get(key)) for key in ("max_lr", "initial_lr", "lr"))
        highest = max(highest, peak or 0.0)
        own = any("warm" in key and number(value) for key, value in entry.items() if isinstance(key, str))
        if own or number(entry.get("lr")) <= highest / 2:
            return
    yield Finding(
        "no-warm-up",
        f"the first update already has the full learning rate, with {batch_size:,} examples per update: training on "
        f"large batches then often diverges or ends at a higher loss (arXiv:1706.02677)",
        "lr=warmup(..., 0.05), or a torch scheduler that starts low",
    )


def number(value: Any) -> float:
    """Return a hyperparameter's value as a number, 0.0 where it is none."""
    return float(value) if isinstance(value, int | float | torch.Tensor) else 0.0
