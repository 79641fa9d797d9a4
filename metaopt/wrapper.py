"""Wrapper: all that the author of a wrapper must know."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from metaopt.errors import HyperparameterError, SpecError
from metaopt.hyperparameters import Hyperparameter, bind, declared
from metaopt.schedule import Schedule

CONTRACT_VERSION = 1

Closure = Callable[[], Any]
Reduce = Literal["mean", "norm"]


@dataclass(frozen=True)
class Slot:
    """One tensor that a wrapper keeps for every parameter, in `state[p]["<label>.<name>"]`.

    `dtype=None` keeps the parameter's own; a text names a dtype, or a hyperparameter whose value names it.
    """

    kind: Literal["anchor", "start", "zeros", "moments", "previous"]
    dtype: str | None = None
    name: str = ""
    # there before the base's first update of the parameter: for what is gathered over several steps
    early: bool = False


@dataclass(frozen=True)
class Counter:
    """One integer that a wrapper counts, in every group under `<label>.<name>`, 0 at first."""

    doc: str = ""


def anchor(*, dtype: str | None = None) -> Any:
    """Declare a copy taken right before a parameter's first update, which follows when a wrapper farther out moves."""
    return Slot("anchor", dtype)


def start(*, dtype: str | None = None) -> Any:
    """Declare a copy taken right before a parameter's first update, which never follows: for averages."""
    return Slot("start", dtype)


def zeros(*, dtype: str | None = None, early: bool = False) -> Any:
    """Declare a tensor shaped like the parameter that begins at zero; `early`: there before the first update."""
    return Slot("zeros", dtype, early=early)


def previous() -> Any:
    """Declare a copy of the parameter from right before the base's update, taken anew at every update.

    `after_update` is then called with the parameters of this very update alone, whose gradients are still there.
    """
    return Slot("previous")


def counter(doc: str = "") -> Any:
    """Declare an integer that is counted across updates: part of the checkpoint, the same in every group."""
    return Counter(doc)


def moments() -> Any:
    """Declare zeros shaped like each moment of the base: `group.<name>` is then {base key: list of tensors}.

    The moments are the base's floating state tensors, except `step` and one-element tensors of larger parameters.
    """
    return Slot("moments")


class Group(ABC):
    """What a wrapper sees of one parameter group: aligned lists of local tensors of one device and dtype.

    Hyperparameters and state are attributes under the names that the wrapper declared.
    """

    params: list[torch.Tensor]
    updates: int
    # of a block: the position in the group's lists of each of its tensors, or of the tensor of its rows
    index: list[int]

    @abstractmethod
    def blocks(self) -> Sequence["Group"]:
        """Return the same in blocks that stay in a cache: several small tensors, or some rows of a large one."""

    @property
    @abstractmethod
    def grads(self) -> list[torch.Tensor]:
        """The gradients, aligned with `params`; a pending lazy scale has been multiplied in."""

    @property
    @abstractmethod
    def base_lr(self) -> Any:
        """The base's learning rate for this update; raises StepError where the base has none."""

    @property
    @abstractmethod
    def maximize(self) -> bool:
        """Whether the base goes up these gradients (torch's `maximize=True`), so that less is worse."""

    @abstractmethod
    def norms(self, tensors: list[torch.Tensor], *, rows: bool = False) -> list[torch.Tensor]:
        """Return the 2-norm of each tensor (aligned with `params`), reduced over shards, 0-dim.

        With `rows`, one norm per index of the first dimension, shaped to broadcast; a vector counts as one row.
        """

    @abstractmethod
    def means(self, tensors: list[torch.Tensor], *, rows: bool = False) -> list[torch.Tensor]:
        """Return the mean of each tensor, reduced over shards; `rows` as for `norms`.

        Without `rows`, sums over a tensor's parts will do as well as its elements.
        """

    @abstractmethod
    def replace_grads(self, gradients: list[torch.Tensor]) -> None:
        """Replace the gradients until the end of this `step()`; afterwards the parameters have none."""

    @abstractmethod
    def clear_grads(self) -> None:
        """Take the gradients away: the next backward pass starts from none."""

    @property
    @abstractmethod
    def base_moments(self) -> dict[str, list[torch.Tensor]]:
        """The base's own moments by key, each aligned with `params` (see `moments`)."""

    @abstractmethod
    def set_params(self, tensors: list[torch.Tensor]) -> None:
        """Set the parameters to `tensors` (cast where dtypes differ); anchors nearer the base follow."""

    @abstractmethod
    def reset_base_state(self) -> None:
        """Forget the base's state of these parameters: its next update starts as if it were its first."""

    @abstractmethod
    def measure(self, name: str, value: torch.Tensor | float, reduce: Reduce = "mean") -> None:
        """Log `value` as `<label>/<name>`; never waits for the device.

        A group is one of several: what all of them measure in one update is averaged, or with "norm" is the norm of
        the whole that their norms belong to.
        """

    @property
    @abstractmethod
    def is_logged(self) -> bool:
        """Whether this update is logged: what costs extra to measure is measured only then."""

    def __getattr__(self, name: str) -> Any:  # hyperparameters and state, named by the wrapper's declarations
        raise AttributeError(name)


class Groups(ABC):
    """All groups at once, as a wrapper on gradients sees them: a norm is global."""

    @abstractmethod
    def __iter__(self) -> Iterator[Group]: ...

    @abstractmethod
    def norm(self, norm_type: float = 2.0) -> torch.Tensor:
        """Return the norm over all gradients, reduced over groups, devices and shards (0-dim)."""

    @abstractmethod
    def groups_with_state(self) -> Iterator[Group]:
        """Yield the groups with every parameter that holds this wrapper's state, with a gradient now or without."""

    @abstractmethod
    def scale(self, factor: torch.Tensor) -> None:
        """Multiply all gradients by a 0-dim factor, lazily: a fused base does it in its own pass."""

    @property
    @abstractmethod
    def is_logged(self) -> bool:
        """Whether this update is logged."""

    @property
    @abstractmethod
    def has_logger(self) -> bool:
        """Whether the run has a log at all: a share of all updates is then measured at each of them."""

    @abstractmethod
    def measure(self, name: str, value: torch.Tensor | float) -> None:
        """Log `value` as `<label>/<name>`; never waits for the device."""

    @abstractmethod
    def skip_update(self, reason: str) -> None:
        """Skip this update: nothing advances, and `opt.skipped` is `reason`. See `Wrapper.may_skip_updates`."""

    @abstractmethod
    def set_counter(self, name: str, value: int) -> None:
        """Set a counter that the wrapper declares, in all groups."""

    def __getattr__(self, name: str) -> Any:  # hyperparameters and counters, from the first group
        raise AttributeError(name)


class Wrapper(ABC):
    """A part around the base: declares hyperparameters and state, and any of the five methods below.

    `class W(Wrapper, every="k")` is called after an update only when the hyperparameter `k` divides the count.
    `class W(Wrapper, elementwise=True)` treats every element alike, more than once: `after_update` may then be called
    with blocks of the group (see `Group.blocks`).
    The object is configuration without state: one object may serve two stacks.
    """

    hyperparameters: ClassVar[dict[str, Hyperparameter]] = {}
    slots: ClassVar[dict[str, Slot]] = {}
    counters: ClassVar[dict[str, Counter]] = {}
    every: ClassVar[str | None] = None
    elementwise: ClassVar[bool] = False
    known_as: ClassVar[tuple[str, ...]] = ()
    # a wrapper that cannot decide without reading from the device says so
    syncs_device: ClassVar[bool] = False
    # a wrapper that calls groups.skip_update() says so: it cannot stand over a base that evaluates the loss itself
    may_skip_updates: ClassVar[bool] = False
    # of a sparse gradient `group.grads` has the stored values alone, which are not aligned with the parameter
    supports_sparse_grads: ClassVar[bool] = False

    arguments: dict[str, Any]
    label: str

    def __init_subclass__(cls, every: str | None = None, elementwise: bool | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.hyperparameters = declared(cls)
        own = vars(cls).items()
        cls.slots = {**cls.slots, **{n: replace(v, name=n) for n, v in own if isinstance(v, Slot)}}
        cls.counters = {**cls.counters, **{n: v for n, v in own if isinstance(v, Counter)}}
        if elementwise is not None:
            cls.elementwise = elementwise
        if every is not None:
            if every not in cls.hyperparameters:
                raise HyperparameterError(f"{cls.__name__}: every={every!r} names no hyperparameter of the class")
            cls.every = every

    def __init__(self, *args: Any, label: str | None = None, **kwargs: Any) -> None:
        where = label or type(self).__name__.lower()
        given = bind(self.hyperparameters, where, args, kwargs)
        values: dict[str, Any] = {}
        for name, hyperparameter in self.hyperparameters.items():
            if name not in given and hyperparameter.required:
                raise HyperparameterError(f"{where} needs {name}: {hyperparameter.doc or 'it has no default'}")
            values[name] = validate_value(hyperparameter, given.get(name, hyperparameter.default), where)
        # class attributes hold the declarations; an instance's own attributes hold its values
        self.__dict__.update(values)
        self.arguments = {name: values[name] for name in given}
        self.label = where

    def validate(self) -> None:  # noqa: B027 - nothing to check is a fine answer
        """Raise HyperparameterError where hyperparameters contradict each other; the default finds nothing."""

    def active_slots(self) -> dict[str, Slot]:
        """Return the slots that this configuration needs; the default needs all that the class declares."""
        return self.slots

    def resets_base_state(self) -> bool:
        """Tell whether this configuration ever calls `group.reset_base_state()`."""
        return False

    def around(self, closure: Closure, groups: Groups) -> Any:
        """Own the evaluation of the loss: call `closure` as often as needed, return the loss."""
        return closure()

    def on_gradients(self, groups: Groups) -> None:  # noqa: B027 - each wrapper defines what it needs
        """Change the gradients, all groups at once, between the evaluation and the update."""

    def before_update(self, group: Group) -> None:  # noqa: B027
        """Act on one group right before the base updates it: on parameters with gradients, all filtered by now."""

    def after_update(self, group: Group) -> None:  # noqa: B027
        """Act on one group after the base has updated its parameters."""

    def averaged(self, group: Group) -> list[torch.Tensor] | None:
        """Return the tensors that `opt.averaged()` shows, aligned with `group.params`, or None."""
        return None

    @classmethod
    def implemented_hooks(cls) -> frozenset[str]:
        """Return which of the five methods the class defines itself."""
        names = ("around", "on_gradients", "before_update", "after_update", "averaged")
        return frozenset(name for name in names if getattr(cls, name) is not getattr(Wrapper, name))

    @classmethod
    def runs_before_base(cls) -> bool:
        """Tell whether the wrapper works on what the base has yet to use: the closure, gradients, the old weights."""
        return bool(cls.implemented_hooks() & {"around", "on_gradients", "before_update"})

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{type(self).__name__}({arguments})"

    def __or__(self, other: Any) -> Any:
        return _composed(self, other)

    def __ror__(self, other: Any) -> Any:
        return _composed(other, self)


def validate_value(hyperparameter: Hyperparameter, value: Any, where: str) -> Any:
    """Return `value` if the hyperparameter allows it: a plain one, or a schedule for a float."""
    if not isinstance(value, Schedule):
        return hyperparameter.validate(value, where=where)
    if not hyperparameter.schedulable:
        raise HyperparameterError(
            f"{where}: {hyperparameter.name} takes no schedule: only a hyperparameter that is one float does; "
            f"give it a plain value"
        )
    return value


# set by metaopt.spec, which alone knows pipelines: a wrapper must not import what stands above it
compose: Callable[[Any, Any], Any] | None = None


def _composed(left: Any, right: Any) -> Any:
    if compose is None:
        raise SpecError("`|` needs metaopt.spec: import metaopt's public names from metaopt itself")
    return compose(left, right)
