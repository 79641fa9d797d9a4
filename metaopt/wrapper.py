"""Wrapper: all that the author of a wrapper must know."""

from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch

from metaopt.errors import HyperparameterError, SpecError
from metaopt.group import Group, Groups
from metaopt.hyperparameters import Hyperparameter, bind, declared
from metaopt.rules import Rule
from metaopt.schedule import validate_value
from metaopt.slots import Counter, Scalar, Slot

CONTRACT_VERSION = 2

Closure = Callable[[], Any]

HOOKS = (
    "around",
    "on_gradients",
    "before_update",
    "on_update",
    "after_updates",
    "after_update",
    "averaged",
    "on_record",
    *("observe", "observe_gradients", "observe_loss"),
)
BEFORE_BASE = frozenset({"around", "on_gradients", "before_update"})

# what a wrapper with `across=` in its class statement takes besides its own hyperparameters
ACROSS_REPLICAS = {
    h.name: h
    for h in (
        Hyperparameter(
            "across",
            None,
            Literal["replicas"] | None,
            choices=(None, "replicas"),
            doc="over what the way that the weights went is averaged before the step; None: it is this process's own",
            per_group=False,
            defines_state=True,
        ),
        Hyperparameter(
            "compress",
            None,
            str | None,
            choices=(None, "bfloat16"),
            doc="the dtype in which replicas send that way; None: at least float32",
            per_group=False,
            defines_state=True,
        ),
        Hyperparameter(
            "fragments",
            1,
            int,
            ge=1,
            doc="parts of the parameters that have their steps in turn, spread over the k updates",
            per_group=False,
            defines_state=True,
        ),
        Hyperparameter(
            "delay",
            0,
            int,
            ge=0,
            doc="updates made while the mean is on its way",
            known_as=("overlap",),
            per_group=False,
            defines_state=True,
        ),
        Hyperparameter(
            "blend",
            0.5,
            float,
            ge=0.0,
            lt=1.0,
            doc="after a delayed step, the share of a replica's own weights in its new ones",
            per_group=False,
        ),
    )
}
Reduce = Literal["mean", "norm"]


class Wrapper(ABC):
    """A part around the base: declares hyperparameters and state, and any of the hooks below.

    `class W(Wrapper, every="k")`: the hooks behind the base run only when the hyperparameter `k` divides the count.
    `class W(Wrapper, elementwise=True)`: the rule treats every element alike, so `on_update` and `after_update` may be
    called with blocks of the group (see `Group.blocks`).
    `class W(Wrapper, every="k", elementwise=True, across="slow")`: the hyperparameters of `ACROSS_REPLICAS` are added,
    and `after_update` steps along `group.mean_way`, the way from the anchor `slow` to the weights. With
    `across="replicas"` it is called for every parameter that may be trained, on all replicas at the same step.
    The object is configuration without state: one object may serve two stacks.
    """

    hyperparameters: ClassVar[dict[str, Hyperparameter]] = {}
    slots: ClassVar[dict[str, Slot]] = {}
    counters: ClassVar[dict[str, Counter]] = {}
    scalars: ClassVar[dict[str, Scalar]] = {}
    acts_every: ClassVar[str | None] = None
    elementwise: ClassVar[bool] = False
    # the anchor from which the way to the weights is averaged over replicas, if the hyperparameter `across` says so
    anchor_across: ClassVar[str | None] = None
    # the class has a rule of elements (`metaopt.elementwise`), as a hook or for one to call
    has_rules: ClassVar[bool] = False
    known_as: ClassVar[tuple[str, ...]] = ()
    # the wrapper reads from the device to decide
    syncs_device: ClassVar[bool] = False
    # the wrapper calls groups.skip_update(): it cannot act around a base that evaluates the loss itself
    may_skip_updates: ClassVar[bool] = False
    # `after_update` also gets frozen parameters (see `after_update`): for averages, which move no weights
    acts_on_frozen: ClassVar[bool] = False
    # the wrapper bounds the size of gradients: the stack then warns of a client that has done so before it
    clips_gradients: ClassVar[bool] = False
    # several calls of step() make one update, as many as this hyperparameter says: `on_gradients` is called by
    # `opt.flush()` too, see `Groups.is_flush`
    spans_steps: ClassVar[str | None] = None
    # the wrapper only looks: see `observe`; it may be written anywhere in the stack, and changes nothing
    observes: ClassVar[bool] = False
    # what the wrapper logs as `<label>/<name>`: name -> what it means
    measures: ClassVar[dict[str, str]] = {}
    # `group.grads` holds only the stored values of a sparse gradient, which are not aligned with the parameter
    supports_sparse_grads: ClassVar[bool] = False

    arguments: dict[str, Any]
    label: str

    def __init_subclass__(
        cls, every: str | None = None, elementwise: bool = False, across: str | None = None, **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        cls.anchor_across = across or cls.anchor_across
        cls.hyperparameters = {**declared(cls), **(ACROSS_REPLICAS if cls.anchor_across else {})}
        own = vars(cls).items()
        cls.slots = {**cls.slots, **{n: replace(v, name=n) for n, v in own if isinstance(v, Slot)}}
        cls.counters = {**cls.counters, **{n: v for n, v in own if isinstance(v, Counter)}}
        cls.scalars = {**cls.scalars, **{n: v for n, v in own if isinstance(v, Scalar)}}
        _refuse_taken_names(cls)
        if "on_update" in vars(cls) and "update_rules" not in vars(cls):
            cls.update_rules = Wrapper.update_rules  # type: ignore[method-assign]
        cls.has_rules = cls.has_rules or any(isinstance(value, Rule) for value in vars(cls).values())
        if elementwise:
            cls.elementwise = True
        if every is not None:
            if every not in cls.hyperparameters:
                raise HyperparameterError(f"{cls.__name__}: every={every!r} names no hyperparameter of the class")
            cls.acts_every = every
        if across is not None:
            _add_pending(cls, across)

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
        if self.anchor_across is None or vars(self)["delay"]:
            return self.slots
        return {name: slot for name, slot in self.slots.items() if name != "pending"}

    @property
    def takes_means(self) -> bool:
        """Whether this configuration steps along means over replicas."""
        return self.anchor_across is not None and vars(self)["across"] is not None

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

    def update_rules(self, group: Group) -> None:
        """Do what `on_update` does by rules of elements, which the optional library joins with the base's update.

        On an accelerator it is called in the place of `on_update`, which by hand may touch less memory of a processor.
        The default takes `on_update` for rules itself, if it is made of them.
        """
        self.on_update(group)

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

    # ---- hooks of a part that only looks (`observes = True`)

    def looks_with(self, hook: str) -> bool:
        """Return whether this configuration needs an observing hook that the class defines; the default needs all."""
        return True

    def looks_ahead(self) -> bool:
        """Return whether `observe` is also called at the update before a logged one, without `group.update`."""
        return False

    def validate_names(self, names: Sequence[str]) -> None:  # noqa: B027
        """Raise HyperparameterError if patterns of names match none of the parameters; the default accepts all."""

    def observe(self, groups: Groups) -> None:  # noqa: B027
        """Look at an update that is logged, after all other parts: `group.update` is all that was added to the weights.

        The gradients are those that the base was given.
        """

    def observe_gradients(self, groups: Groups, *, gathered: bool) -> None:  # noqa: B027
        """Look at gradients before any part changes them; again, `gathered`, when those of several steps are one."""

    def observe_loss(self, closure: Closure, groups: Groups) -> None:  # noqa: B027
        """Evaluate the loss once more, at `step(closure)`: leave weights and gradients as they were, bit for bit."""

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


def _add_pending(cls: type[Wrapper], across: str) -> None:
    """Add the slot for means that are on their way when a checkpoint is taken."""
    anchored = cls.slots.get(across)
    if anchored is None or anchored.kind != "anchor" or cls.acts_every is None or not cls.elementwise:
        raise HyperparameterError(
            f"{cls.__name__}: across={across!r} must name an anchor of the class, which needs every= and "
            f"elementwise=True beside it"
        )
    pending = Slot("zeros", anchored.dtype, anchored.device, name="pending")
    cls.slots = {**cls.slots, "pending": pending}


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
