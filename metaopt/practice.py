"""Rules of practice that `metaopt.explain` looks for: decay of a size for another base, clips in vain, no warm-up."""

from collections.abc import Iterator
from typing import Any

import torch

from metaopt.engine.chain import Chain, ParamGroup
from metaopt.explanation import Finding
from metaopt.probing import Character, acts_in_vain, character
from metaopt.stack import Stack
from metaopt.wrapper import Wrapper

Optimizer = torch.optim.Optimizer
# what papers use: 1e-5 to 5e-4 with SGD (added to the gradient), 0.01 to 0.3 with AdamW (apart from it)
MOST_OF_SGD = 5e-4
LEAST_OF_ADAMW = 1e-2
# examples per update from which arXiv:1706.02677 and its followers warm up
LARGE_BATCH = 1024


def in_practice(optimizer: Optimizer, batch_size: int | None, peak: float | None) -> Iterator[Finding]:
    """Find settings that fit another base, or another batch; `peak` is the highest rate of the run, if it is known."""
    chains = optimizer.chains if isinstance(optimizer, Stack) else (Chain(optimizer),)
    for chain in chains:
        yield from _decays(chain, chain.groups_in(optimizer.param_groups))
    if isinstance(optimizer, Stack):
        yield from _clips(optimizer)
    if batch_size is not None and batch_size >= LARGE_BATCH:
        yield from _warm_up(optimizer, batch_size, peak)


def _decays(chain: Chain, entries: list[ParamGroup]) -> Iterator[Finding]:
    told: set[str] = set()
    for entry in entries:
        for key, decay, coupled in _strengths(chain, entry):
            if not decay or MOST_OF_SGD < decay < LEAST_OF_ADAMW:
                continue
            found = character(chain, entry)
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
            f"{key}={decay:g} is a strength for SGD: {base} does not add it to the gradient, and it hardly acts",
            f"0.01 to 0.1 with {base}, or 0 for none",
        )
    if found.ignores_scale and coupled and decay >= LEAST_OF_ADAMW:
        return Finding(
            "decay-of-adamw",
            f"{key}={decay:g} is a strength for AdamW: here it is added to the gradient, and {base} divides it by the "
            f"gradient's size: strong where gradients are small, weak where they are large",
            f"adamw(weight_decay={decay:g}), or decay({decay:g}) before the base, which act apart from the gradient",
        )
    if not found.ignores_scale and decay >= LEAST_OF_ADAMW:
        return Finding(
            "decay-of-adamw",
            f"{key}={decay:g} is a strength for AdamW: {base} needs higher rates, and takes lr * weight_decay of the "
            f"weights per update",
            f"1e-5 to 5e-4 with {base}",
        )
    return None


def _clips(stack: Stack) -> Iterator[Finding]:
    for wrapper, chains in _before_bases(stack):
        first = [(chain, next(iter(chain.groups_in(stack.param_groups)), None)) for chain in chains]
        groups = [(chain, entry) for chain, entry in first if entry is not None]
        if groups and all(acts_in_vain(chain, entry, wrapper) for chain, entry in groups):
            bases = " and ".join(dict.fromkeys(type(chain.base).__name__ for chain, _ in groups))
            reason = f"{wrapper.label} before {bases} changes nothing: the size of a gradient is ignored there"
            yield Finding("clip-in-vain", reason, "leave it out")


def _before_bases(stack: Stack) -> Iterator[tuple[Wrapper, tuple[Chain, ...]]]:
    """Yield every wrapper on gradients that may be tried by itself, with the chains that it acts on."""
    every = [*stack.wrappers, *(w for chain in stack.chains for w in chain.wrappers if w not in stack.wrappers)]
    for wrapper in every:
        gathers = any(slot.early for slot in wrapper.active_slots().values())
        if "on_gradients" in wrapper.implemented_hooks() and not wrapper.may_skip_updates and not gathers:
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
        f"{batch_size:,} examples per update at the full rate from the first update on: large batches then diverge, "
        f"or end worse (arXiv:1706.02677)",
        "lr=warmup(..., 0.05), or a torch scheduler that begins low",
    )


def number(value: Any) -> float:
    """Return a hyperparameter's value as a number, 0.0 where it is none."""
    return float(value) if isinstance(value, int | float | torch.Tensor) else 0.0
