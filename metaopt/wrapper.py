"""Wrapper: all that the author of a wrapper must know."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from metaopt.errors import HyperparameterError, SpecError
from metaopt.hyperparameters import Hyperparameter, bind, declared
from metaopt.schedule import validate_value

CONTRACT_VERSION = 2

Closure = Callable[[], Any]
Reduce = Literal["mean", "norm"]


# ---- what a wrapper keeps


@dataclass(frozen=True)
class Slot:
    """A tensor that a wrapper keeps for every parameter, in `state[p]["<label>.<name>"]`.

    `dtype` and `device` are text, or the name of a hyperparameter whose value is. `dtype=None` keeps the parameter's
    own; "at least float32" widens 16 bits. `copies` makes a list of so many, under `<label>.<name>.<i>`.
    """

    kind: Literal["anchor", "start", "zeros", "number", "moments", "previous"]
    dtype: str | None = None
    device: str | None = None
    name: str = ""
    # exists before the base's first update of the parameter: for what is summed up over several steps
    early: bool = False
    copies: int | str | None = None
    initial: float = 0.0  # of a number


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
        return Slot("number", "at least float32", initial=initial)
    return Scalar(initial, size, per, doc)


def history(n: int | str, *, per: Literal["group", "run"] = "group", doc: str = "") -> Any:
    """Declare the last n values of a number, oldest first, NaN until there are so many; see `Group.push`.

    `n` is a number or the name of the hyperparameter that holds it.
    """
    return Scalar(float("nan"), n, per, doc)


# ---- what a wrapper sees


class _Log(ABC):
    """What groups and all groups together have in common: the log."""

    @property
    @abstractmethod
    def is_logged(self) -> bool:
        """Whether this update is logged: what costs extra to measure is measured only then."""

    def __getattr__(self, name: str) -> Any:  # hyperparameters and state, named by the wrapper's declarations
        raise AttributeError(name)

    @abstractmethod
    def push(self, name: str, value: torch.Tensor) -> None:
        """Append a 0-dim value to a `history`; the oldest value goes."""

    @abstractmethod
    def mean_over_replicas(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the means of tensors over the processes of the default process group; without one, the tensors."""


class Group(_Log):
    """What a wrapper sees of one parameter group: aligned lists of local tensors of one device and dtype.

    Hyperparameters, counters, scalars and state are attributes under the names that the wrapper declared.
    """

    params: list[torch.Tensor]
    updates: int
    # of a block: where in the group's lists each of its tensors, or the tensor of its rows, is
    index: list[int]

    @abstractmethod
    def blocks(self) -> Sequence["Group"]:
        """Return the same in blocks that fit into a cache: several small tensors, or some rows of a large one."""

    @property
    @abstractmethod
    def grads(self) -> list[torch.Tensor]:
        """The gradients, aligned with `params`; a pending lazy scale has been multiplied in."""

    @property
    @abstractmethod
    def update(self) -> list[torch.Tensor]:
        """What is added to the weights, aligned with `params`: only in `on_update` and `after_updates`.

        Changes in place count. float32 for parameters of 16 bits; the sum with the weights is rounded once.
        """

    @property
    @abstractmethod
    def base_lr(self) -> Any:
        """The base's learning rate for this update; raises StepError if the base has none."""

    @property
    @abstractmethod
    def maximize(self) -> bool:
        """Whether the base goes up these gradients (torch's `maximize=True`), so that less is worse."""

    @abstractmethod
    def norms(self, tensors: list[torch.Tensor], *, rows: bool = False) -> list[torch.Tensor]:
        """Return the 2-norm of each tensor (aligned with `params`), reduced over shards, 0-dim, at least float32.

        With `rows`, one norm per index of the first dimension, shaped to broadcast; a vector counts as one row.
        """

    @abstractmethod
    def means(self, tensors: list[torch.Tensor], *, rows: bool = False) -> list[torch.Tensor]:
        """Return the mean of each tensor, reduced over shards, at least float32; `rows` as for `norms`.

        Without `rows`, sums over a tensor's parts will do as well as its elements.
        """

    @abstractmethod
    def dots(self, a: list[torch.Tensor], b: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the inner product (its real part) of each two tensors, reduced over shards, at least float32."""

    @abstractmethod
    def random_like(self, tensors: Any, distribution: Literal["normal", "uniform"] = "normal") -> Any:
        """Return noise for each of the tensors, a list aligned with `params` (or one of its tensors).

        The numbers depend only on the wrapper's `seed`, the count of updates, the parameter and how often this was
        called before in the update: they are the same on all ranks, also for shards, and after a resume, whatever the
        order of the groups. A parameter is known by its name, or by its position if it has none. Standard normal, or
        uniform on [0, 1).
        """

    @abstractmethod
    def replace_grads(self, gradients: list[torch.Tensor]) -> None:
        """Let these be the gradients until the end of this `step()`; afterwards the parameters have none.

        A frozen parameter (without `requires_grad` and without a gradient) gets none.
        """

    @abstractmethod
    def clear_grads(self) -> None:
        """Take the gradients away: the next backward pass starts from none."""

    @property
    @abstractmethod
    def base_moments(self) -> dict[str, list[torch.Tensor]]:
        """The base's own moments by key, each aligned with `params` (see `moments`)."""

    @abstractmethod
    def set_params(self, tensors: list[torch.Tensor]) -> None:
        """Set the parameters to `tensors` (cast if dtypes differ); anchors nearer the base follow."""

    @abstractmethod
    def reset_base_state(self) -> None:
        """Forget the base's state of these parameters: its next update starts as if it were its first."""

    @abstractmethod
    def measure(self, name: str, value: torch.Tensor | float, reduce: Reduce = "mean") -> None:
        """Log `value` as `<label>/<name>`; never waits for the device.

        A group is one of several: what all of them measure in one update is averaged, or with "norm" is the norm of
        the whole that their norms belong to.
        """


class Groups(_Log):
    """All groups that a wrapper acts on at once: norms and decisions that are global."""

    @abstractmethod
    def __iter__(self) -> Iterator[Group]: ...

    @abstractmethod
    def norm(self, norm_type: float = 2.0) -> torch.Tensor:
        """Return the norm over all gradients, reduced over groups, devices and shards (0-dim)."""

    @abstractmethod
    def norm_of(self, name: str) -> torch.Tensor:
        """Return the 2-norm of "params", "grads", "update" or a slot, over groups, devices and shards (0-dim)."""

    @abstractmethod
    def dot(self, a: str, b: str) -> torch.Tensor:
        """Return the inner product (its real part) of two lists, named as for `norm_of`."""

    @abstractmethod
    def groups_with_state(self) -> Iterator[Group]:
        """Yield the groups with every parameter that has this wrapper's state, with or without a gradient now."""

    @abstractmethod
    def scale(self, factor: torch.Tensor | float) -> None:
        """Multiply all gradients by a number or a 0-dim factor, lazily: a fused base does it in its own pass."""

    @property
    @abstractmethod
    def has_logger(self) -> bool:
        """Whether the run has a log at all: a share of all updates is then measured at each of them."""

    @abstractmethod
    def measure(self, name: str, value: torch.Tensor | float) -> None:
        """Log `value` as `<label>/<name>`; never waits for the device."""

    @abstractmethod
    def buffers_kept(self) -> AbstractContextManager[None]:
        """Return a context for one more evaluation in `around`: what it writes to the model's buffers is undone.

        Statistics of batch norm then count a batch once.
        """

    @property
    @abstractmethod
    def step_weight(self) -> float | torch.Tensor:
        """How much the gradients of this step count beside those of other steps: 1.0, or what `opt.weigh` was given."""

    @property
    @abstractmethod
    def is_flush(self) -> bool:
        """Whether `opt.flush()` asks for an update of what was gathered; there may be no gradients then."""

    @abstractmethod
    def skip_update(self, reason: str) -> None:
        """Skip this update: nothing advances, and `opt.skipped` is `reason`. See `Wrapper.may_skip_updates`."""

    @abstractmethod
    def set_counter(self, name: str, value: int | float) -> None:
        """Set a counter or a number that the wrapper declares, in all groups."""

    @abstractmethod
    def change_lr(self, change: Callable[[float], float]) -> None:
        """Replace the base's learning rate of every group by `change(rate)`, from the next update on.

        A schedule goes on by the same factor; a rate of 0 stays. Reads a rate that is a tensor from its device.
        """


# ---- the wrapper itself


HOOKS = (
    "around",
    "on_gradients",
    "before_update",
    "on_update",
    "after_updates",
    "after_update",
    "averaged",
    "on_record",
)
BEFORE_BASE = frozenset({"around", "on_gradients", "before_update"})


class Wrapper(ABC):
    """A part around the base: declares hyperparameters and state, and any of the eight hooks below.

    `class W(Wrapper, every="k")`: the hooks behind the base run only when the hyperparameter `k` divides the count.
    `class W(Wrapper, elementwise=True)`: the rule treats every element alike, so `on_update` and `after_update` may be
    called with blocks of the group (see `Group.blocks`).
    The object is configuration without state: one object may serve two stacks.
    """

    hyperparameters: ClassVar[dict[str, Hyperparameter]] = {}
    slots: ClassVar[dict[str, Slot]] = {}
    counters: ClassVar[dict[str, Counter]] = {}
    scalars: ClassVar[dict[str, Scalar]] = {}
    acts_every: ClassVar[str | None] = None
    elementwise: ClassVar[bool] = False
    known_as: ClassVar[tuple[str, ...]] = ()
    # the wrapper reads from the device to decide
    syncs_device: ClassVar[bool] = False
    # the wrapper calls groups.skip_update(): it cannot act around a base that evaluates the loss itself
    may_skip_updates: ClassVar[bool] = False
    # `after_update` also gets frozen parameters (see `after_update`): for averages, which move no weights
    acts_on_frozen: ClassVar[bool] = False
    # the wrapper bounds the size of gradients: the stack then warns of a client that has done so before it
    clips_gradients: ClassVar[bool] = False
    # several calls of step() make one update: `on_gradients` is called by `opt.flush()` too, see `Groups.is_flush`
    spans_steps: ClassVar[bool] = False
    # `group.grads` holds only the stored values of a sparse gradient, which are not aligned with the parameter
    supports_sparse_grads: ClassVar[bool] = False

    arguments: dict[str, Any]
    label: str

    def __init_subclass__(cls, every: str | None = None, elementwise: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.hyperparameters = declared(cls)
        own = vars(cls).items()
        cls.slots = {**cls.slots, **{n: replace(v, name=n) for n, v in own if isinstance(v, Slot)}}
        cls.counters = {**cls.counters, **{n: v for n, v in own if isinstance(v, Counter)}}
        cls.scalars = {**cls.scalars, **{n: v for n, v in own if isinstance(v, Scalar)}}
        _refuse_taken_names(cls)
        if elementwise:
            cls.elementwise = True
        if every is not None:
            if every not in cls.hyperparameters:
                raise HyperparameterError(f"{cls.__name__}: every={every!r} names no hyperparameter of the class")
            cls.acts_every = every

    def __init__(self, *args: Any, label: str | None = None, **kwargs: Any) -> None:
        where = label or type(self).__name__.lower()
        arguments = bind(self.hyperparameters, where, args, kwargs)
        values: dict[str, Any] = {}
        for name, hyperparameter in self.hyperparameters.items():
            if name not in arguments and hyperparameter.required:
                raise HyperparameterError(f"{where} needs {name}: {hyperparameter.doc or 'it has no default'}")
            values[name] = validate_value(hyperparameter, arguments.get(name, hyperparameter.default), where)
        # class attributes hold the declarations; an instance's own attributes hold its values
        self.__dict__.update(values)
        self.arguments = {name: values[name] for name in arguments}
        self.label = where

    def validate(self) -> None:  # noqa: B027 - nothing to refuse is a fine answer
        """Raise HyperparameterError if hyperparameters contradict each other; the default accepts all."""

    def active_slots(self) -> dict[str, Slot]:
        """Return the slots that this configuration needs; the default needs all that the class declares."""
        return self.slots

    def adapt_base(self, base: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
        """Return the class that is built in the place of a base's: a subclass, or `base` itself as by default."""
        return base

    def resets_base_state(self) -> bool:
        """Return whether this configuration ever calls `group.reset_base_state()`."""
        return False

    def around(self, closure: Closure, groups: Groups) -> Any:
        """Own the evaluation of the loss: call `closure` as often as needed, return the loss."""
        return closure()

    def on_gradients(self, groups: Groups) -> None:  # noqa: B027 - each wrapper defines what it needs
        """Change the gradients, all groups at once, between the evaluation and the update."""

    def before_update(self, group: Group) -> None:  # noqa: B027
        """Act on one group right before the base updates it, on parameters with a gradient; gradients are final."""

    def on_update(self, group: Group) -> None:  # noqa: B027
        """Change `group.update` in place: the base has worked out its step, and the weights have not changed yet.

        `group.params` are the weights before the update. The group holds only parameters that have a gradient.
        """

    def after_updates(self, groups: Groups) -> None:  # noqa: B027
        """Act on all groups at once after the update; `group.update` is what was added, and changes of it count."""

    def after_update(self, group: Group) -> None:  # noqa: B027
        """Act on one group after the base has updated its parameters.

        The group holds every parameter that has been updated so far, also without a gradient in this update, but not
        those that are frozen now: without `requires_grad` and without a gradient. See `acts_on_frozen`.
        """

    def averaged(self, group: Group) -> list[torch.Tensor] | None:
        """Return the tensors that `opt.averaged()` shows, aligned with `group.params`, or None; may compute them."""
        return None

    def on_record(self, groups: Groups, name: str, value: Any) -> None:  # noqa: B027
        """Act on a value that the user gives to `opt.record(name=value)`, between two updates."""

    @classmethod
    def implemented_hooks(cls) -> frozenset[str]:
        """Return which of the hooks the class defines itself."""
        return frozenset(name for name in HOOKS if getattr(cls, name) is not getattr(Wrapper, name))

    @classmethod
    def moves_weights(cls) -> bool:
        """Return whether the wrapper moves weights that the base has set: averages do not."""
        hooks = cls.implemented_hooks()
        return bool(hooks & {"on_update", "after_updates"}) or ("after_update" in hooks and not cls.acts_on_frozen)

    @classmethod
    def runs_before_base(cls) -> bool:
        """Return whether the wrapper works on what the base has yet to use: closure, gradients, the old weights."""
        return bool(cls.implemented_hooks() & BEFORE_BASE)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{type(self).__name__}({arguments})"

    def __or__(self, other: Any) -> Any:
        return _composed(self, other)

    def __ror__(self, other: Any) -> Any:
        return _composed(other, self)


def _refuse_taken_names(cls: type[Wrapper]) -> None:
    """Raise HyperparameterError for a declared name that a group or a wrapper already uses: it would be hidden."""
    taken = {*dir(Group), *dir(Groups), *Group.__annotations__, *dir(Wrapper), *Wrapper.__annotations__}
    for name in (*cls.hyperparameters, *cls.slots, *cls.counters, *cls.scalars):
        if name in taken:
            raise HyperparameterError(
                f"{cls.__name__} declares {name!r}, which is a name of metaopt's own on groups or wrappers and would "
                f"hide it: choose another, such as {name + '_value'!r}"
            )


# set by metaopt.specs.pipeline, which alone knows pipelines: a wrapper must not import what is above it
compose: Callable[[Any, Any], Any] | None = None


def _composed(left: Any, right: Any) -> Any:
    if compose is None:
        raise SpecError("`|` needs metaopt.specs: import metaopt's public names from metaopt itself")
    return compose(left, right)
