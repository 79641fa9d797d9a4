"""Which weights of a stack are evaluated: the outermost average where it keeps one, the fast ones otherwise."""

from contextlib import AbstractContextManager, nullcontext

from metaopt.stack import Stack

FAST = "fast"


def evaluated(opt: Stack) -> str:
    """Return the name of the weights that `shown` shows: `fast`, or `averaged (lookahead)`."""
    label = _outermost(opt)
    return FAST if label is None else f"averaged ({label})"


def shown(opt: Stack) -> AbstractContextManager[None]:
    """Return a context in which the model holds the weights to evaluate."""
    label = _outermost(opt)
    return nullcontext() if label is None else opt.averaged(label)


def _outermost(opt: Stack) -> str | None:
    # of several averages the outermost: it has seen the whole run
    return next((w.label for w in reversed(opt.wrappers) if "averaged" in w.acts_on()), None)
