"""What a check is, and what can come of one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from metaopt.errors import MetaoptError

Status = Literal["passed", "failed", "excused", "outdated", "not applicable", "not run"]


class CheckFailed(MetaoptError, AssertionError):
    """A check that a part does not pass: what is wrong, why it matters, what to do."""

    def __init__(self, what: str, why: str, todo: str) -> None:
        super().__init__(f"{what.rstrip('.')}. {why}. {todo}.")
        self.what, self.why, self.todo = what, why, todo


@contextmanager
def failing(where: str, why: str, todo: str) -> Iterator[None]:
    """Say of a failure in here where it came up, and what to do there; its own advice is for any step."""
    try:
        yield
    except CheckFailed as error:
        raise CheckFailed(f"{where}: {error.what}", why, todo) from error.__cause__


class NotApplicable(Exception):
    """A check that says nothing about this part, with the reason."""


@dataclass(frozen=True)
class Check:
    """One claim about a part, and the function that raises CheckFailed where it does not hold.

    `presumes` names checks without which this one says nothing: where one of them fails, that is what has to be mended.
    """

    name: str
    kinds: tuple[str, ...]
    claim: str
    holds: Callable[[Any], None]
    presumes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """What came of one check of one part; `reason` is empty where it passed."""

    part: str
    check: str
    claim: str
    status: Status
    reason: str = ""

    @property
    def bad(self) -> bool:
        """Whether the part, or what its plugin says of it, has to change."""
        return self.status in ("failed", "outdated")


CHECKS: dict[str, Check] = {}

# a run that cannot be repeated, and one that cannot be resumed, differ from others whatever is done to them
REPEATS = "stacks_do_not_disturb_each_other"
RESUMES = "resumes_in_a_new_process"


def check(*kinds: str, presumes: tuple[str, ...] = ()) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Make a function a check of these kinds of parts, under its own name; its docstring is the claim."""

    def add(function: Callable[[Any], None]) -> Callable[[Any], None]:
        claim = " ".join((function.__doc__ or "").split("\n\n")[0].split()).rstrip(".")
        CHECKS[function.__name__] = Check(function.__name__, kinds, claim, function, presumes)
        return function

    return add
