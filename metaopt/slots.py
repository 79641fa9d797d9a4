"""What a wrapper keeps: tensors for each parameter, numbers for each group, tensors for a group or the run."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Slot:
    """A tensor that a wrapper keeps for every parameter, in `state[p]["<label>.<name>"]`.

    `dtype` and `device` are text, or the name of a hyperparameter whose value is. `dtype=None` keeps the parameter's
    own; "at least float32" widens 16 bits. `copies` makes a list of so many, under `<label>.<name>.<i>`.
    """

    kind: Literal["anchor", "start", "zeros", "scalar", "moments", "previous"]
    dtype: str | None = None
    device: str | None = None
    name: str = ""
    # exists before the base's first update of the parameter: for what is summed up over several steps
    early: bool = False
    copies: int | str | None = None
    initial: float = 0.0  # of a scalar


@dataclass(frozen=True)
class Counter:
    """A number of Python's that a wrapper keeps in every group under `<label>.<name>`: an integer, or a float."""

    doc: str = ""
    initial: int | float = 0


@dataclass(frozen=True)
class Scalar:
    """A small tensor that a wrapper keeps for each group or for the run, under `<label>.<name>` in the groups."""

    initial: float
    size: int | str | None
    per: Literal["group", "run"]
    doc: str = ""


def anchor(*, dtype: str | None = None, device: str | None = None) -> Any:
    """Declare a copy of the parameter from before its first update; it follows when a wrapper farther out moves."""
    return Slot("anchor", dtype, device)


def start(*, dtype: str | None = None, device: str | None = None) -> Any:
    """Declare a copy of the parameter from before its first update, which never follows: for averages."""
    return Slot("start", dtype, device)


def zeros(
    *, dtype: str | None = None, early: bool = False, device: str | None = None, copies: int | str | None = None
) -> Any:
    """Declare a tensor like the parameter that begins at zero; `early`: it exists before the first update.

    With `copies`, a number or the hyperparameter that holds it, `group.<name>` is a list of so many lists.
    """
    return Slot("zeros", dtype, device, early=early, copies=copies)


def previous() -> Any:
    """Declare the parameter's value from right before the base's update; it exists only during that update.

    `after_update` is then called only with the parameters of this update, whose gradients are still there.
    """
    return Slot("previous")


def moments() -> Any:
    """Declare zeros shaped like each moment of the base: `group.<name>` is then {base key: list of tensors}.

    The moments are the base's floating state tensors, except `step` and one-element tensors of larger parameters.
    """
    return Slot("moments")


def counter(doc: str = "") -> Any:
    """Declare an integer that is counted across updates: part of the checkpoint, the same in every group."""
    return Counter(doc)


def number(initial: float, doc: str = "") -> Any:
    """Declare a float that is kept across updates: part of the checkpoint, the same in every group.

    It is a number of Python's, unlike a `scalar`: for what the host decides on. `groups.set_counter` changes it.
    """
    return Counter(doc, float(initial))


def scalar(
    initial: float, *, size: int | str | None = None, per: Literal["group", "run", "parameter"] = "group", doc: str = ""
) -> Any:
    """Declare a number on the device, changed in place and never read by Python: part of the checkpoint.

    It is a 0-dim tensor, or one of `size` elements, float32 (float64 beside float64 parameters). `per="run"` makes
    one for all groups that the wrapper acts on; with `per="parameter"` `group.<name>` is a list aligned with `params`,
    and each number is in `state[p]`, the same on all ranks.
    """
    if per == "parameter":
        return Slot("scalar", "at least float32", initial=initial)
    return Scalar(initial, size, per, doc)


def history(n: int | str, *, per: Literal["group", "run"] = "group", doc: str = "") -> Any:
    """Declare the last n values of a number, oldest first, NaN until there are so many; see `Group.push`.

    `n` is a number or the name of the hyperparameter that holds it.
    """
    return Scalar(float("nan"), n, per, doc)
