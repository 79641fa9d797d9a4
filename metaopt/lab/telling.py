"""What goes wrong in a run that nobody here raised, told in one sentence: memory that ran out, code from elsewhere."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from metaopt.errors import LogError, MetaoptError, ProblemError
from metaopt.lab.ranks import lost_contact

# of torch's CPU allocator, which raises a bare RuntimeError
_NO_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc")
_LONGEST = 300


@contextmanager
def told(what: str, kept: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Turn whatever is raised inside into a MetaoptError about `what`, with `kept()` behind it: what is not lost."""
    try:
        yield
    except LogError as error:
        raise LogError(f"{error}{_behind(kept)}") from error
    except MetaoptError:
        raise
    except Exception as error:  # an optimizer or a problem from elsewhere may raise anything
        if ran_out_of_memory(error):
            raise ProblemError(
                f"{what}: out of memory ({_line(error)}): take a smaller model, batch or number of processes"
                f"{_behind(kept)}"
            ) from error
        if lost_contact(error):
            raise ProblemError(f"{what}: another rank has ended, and this one with it{_behind(kept)}") from error
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise ProblemError(
            f"{what}: {type(error).__name__}: {_line(error)} ({at.filename}, line {at.lineno}){_behind(kept)}"
        ) from error


def ran_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that a device, or this machine, has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:_LONGEST] or "no reason given"


def _behind(kept: Callable[[], str]) -> str:
    return f". {said}" if (said := kept()) else ""
