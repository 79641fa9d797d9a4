"""Which weights of a stack are evaluated: an average of the stack, one that the base keeps itself, or the fast ones."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from metaopt.stack import Stack

FAST = "fast"


def evaluated(opt: Stack) -> str:
    """Return the name of the weights that `shown` shows: `fast`, `averaged (lookahead)`, or those of the base's own."""
    label = opt.default_average
    if label is not None:
        return f"averaged ({label})"
    return f"{type(opt.base).__name__}'s own" if _has_modes(opt) else FAST


@contextmanager
def shown(opt: Stack) -> Iterator[None]:
    """Hold the weights to evaluate in the model for the length of the context."""
    label = opt.default_average
    opt.eval()  # a base such as a schedule-free one trains other weights than it shows
    try:
        with nullcontext() if label is None else opt.averaged(label):
            yield
    finally:
        opt.train()


def _has_modes(opt: Stack) -> bool:
    return any(callable(getattr(chain.base, "eval", None)) for chain in opt.chains)
