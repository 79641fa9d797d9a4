"""Scratch bases: what a base does, tried with a new one of the same class over tensors of its own. Changes no run."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from metaopt.engine.chain import Chain, ParamGroup, ParamState

# a base goes along with a move of the weights if this share of it is left after so many of the base's steps
LEAST_KEPT = 0.8
TRIED_STEPS = 8


def _arguments(chain: Chain, group: ParamGroup) -> dict[str, Any]:
    """Return what the base's constructor takes of a group, or of its defaults."""
    found = {k: v for k, v in {**chain.base.defaults, **group}.items() if k in chain.constructor_names}
    if "lr" in found:  # of the group it may be a client's 0, by which a few bases divide
        found["lr"] = chain.base.defaults.get("lr", found["lr"])
    return found


def constructor_state(chain: Chain, group: ParamGroup, p: torch.Tensor) -> ParamState:
    """Return the state that the base's constructor makes for a parameter like `p`: {} for most bases."""
    with _nothing_drawn(p), torch.enable_grad():
        zeros = torch.zeros_like(p).requires_grad_()
        scratch = type(chain.base)([zeros], **_arguments(chain, group))
    return dict(scratch.state.get(zeros, {}))


def scratch_step(
    chain: Chain, group: ParamGroup, like: torch.Tensor, gradient: float = 0.0
) -> tuple[ParamState, ParamGroup, list[str]]:
    """Step a new base of the same class over zeros like `like`, all gradients being `gradient`.

    Returns the state, the group, and which numbers of the group the step changed. The base may draw random
    numbers: the generators are left as they were. Raises whatever the class raises.
    """
    with _nothing_drawn(like):
        with torch.enable_grad():
            zeros = torch.zeros_like(like).requires_grad_()
            zeros.grad = torch.full_like(zeros, gradient)
            scratch = type(chain.base)([zeros], **_arguments(chain, group))
        other = Chain(scratch)
        other.call_mode("train")
        made = scratch.param_groups[0]
        before = {key: _number(value) for key, value in made.items()}
        with torch.no_grad():
            other.step(*((lambda: torch.zeros(()),) if chain.needs_closure else ()))
    counted = [k for k, v in made.items() if _number(v) != before.get(k) and k not in ("lr", "params")]
    return dict(scratch.state.get(zeros, {})), made, counted


def _undoes_moves(chain: Chain, group: ParamGroup) -> bool:
    """Return whether the base takes a move of the weights back that others have made between two of its steps.

    A schedule-free optimizer does: it steps from a point in its own state, which does not move along. Tried with
    two scratch bases, one of which finds its weights moved by 1; False if the class refuses what it is tried with.
    """
    like = next((p for p in group["params"] if p.is_floating_point()), None)
    if like is None or type(chain.base).__module__.startswith("torch.optim."):
        return False
    try:
        ends = [_end_after_move(chain, group, like, move) for move in (0.0, 1.0)]
    except Exception:  # whatever a class from elsewhere raises for parameters of this shape
        return False
    return bool((ends[1] - ends[0]).mean() < LEAST_KEPT)


def _end_after_move(chain: Chain, group: ParamGroup, like: torch.Tensor, move: float) -> torch.Tensor:
    with _nothing_drawn(like):
        with torch.enable_grad():
            weights = torch.ones([2] * like.dim(), device=like.device, requires_grad=True)
            scratch = type(chain.base)([weights], **_arguments(chain, group))
        other = Chain(scratch)
        other.call_mode("train")
        with torch.no_grad():
            for _ in range(TRIED_STEPS):
                weights.grad = torch.full_like(weights, 0.01)
                other.step(*((lambda: torch.zeros(()),) if chain.needs_closure else ()))
                weights.add_(move)
                move = 0.0
    return weights.detach()


def bases_undoing_moves(
    chains: Iterable[Chain], groups: Sequence[ParamGroup], *, only_modes: bool = False
) -> list[tuple[Chain, list[str]]]:
    """Return the bases whose next step undoes moves of the weights, with the labels of the wrappers that move them.

    `only_modes`: try only bases with `train()` and `eval()`, which a schedule-free one has; others cost time.
    """
    found = []
    for chain in chains:
        movers = [w.label for w in chain.ordered if w.moves_weights()]
        group = next(iter(chain.groups_in(list(groups))), None)
        with_modes = callable(getattr(chain.base, "eval", None))
        if movers and group is not None and (with_modes or not only_modes) and _undoes_moves(chain, group):
            found.append((chain, movers))
    return found


@contextmanager
def _nothing_drawn(like: torch.Tensor) -> Iterator[None]:
    with torch.random.fork_rng(devices=[like.device] if like.is_cuda else []):
        yield


def _number(value: Any) -> float | None:
    if isinstance(value, torch.Tensor):
        return float(value) if value.numel() == 1 else None
    return float(value) if isinstance(value, int | float) else None
