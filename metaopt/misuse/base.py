"""What a stack warns of: things that are allowed, and that nobody can have meant."""

from collections.abc import Sequence

import torch

from metaopt.errors import warn
from metaopt.wrapper import Wrapper


def warn_of_bare_step(base: torch.optim.Optimizer, wrappers: Sequence[Wrapper]) -> None:
    """Warn that somebody steps the base itself, past the stack."""
    parts = ", ".join(wrapper.label for wrapper in wrappers) or "the stack"
    warn(
        f"{type(base).__name__}.step() was called on the optimizer inside a stack: the stack did not see this update, "
        f"so {parts} did not act and the update is not counted. Call step() of the stack, in place of the optimizer's"
    )


def warn_of_kernel(base: torch.optim.Optimizer) -> None:
    """Warn that a kernel which the user chose would compute wrong updates without an error."""
    warn(
        f"{type(base).__name__}(fused=True): if a gradient has other strides than its parameter, torch's fused kernel "
        f"on a processor updates wrong elements, without an error (torch 2.13). The group runs with fused=None "
        f"from now on; make weights and gradients contiguous, or leave fused out"
    )


def warn_of_undone_moves(base: torch.optim.Optimizer, movers: Sequence[str]) -> None:
    """Warn that wrappers move weights, and the base takes the moves back."""
    warn(f"{fight(base, movers)}. {FIGHT_FIX}")


FIGHT_FIX = "Leave such parts out; averages that move nothing, such as ema, are fine"


def fight(base: torch.optim.Optimizer, movers: Sequence[str]) -> str:
    """Return in words that wrappers work against the base."""
    act = "moves the weights" if len(movers) == 1 else "move the weights"
    return (
        f"{' and '.join(movers)} {act}, but {type(base).__name__} steps from a point in its own state that does not "
        f"move along, and takes the moves back"
    )
