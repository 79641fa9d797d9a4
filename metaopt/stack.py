"""Stack: a base optimizer with wrappers around it, itself a `torch.optim.Optimizer`."""

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from metaopt import averaging, composition, evaluation, first_update, loading, template
from metaopt.errors import StepError
from metaopt.metrics import Metrics
from metaopt.reporting import ReportingScheduler
from metaopt.schedule import Schedule
from metaopt.timetable import Timetable
from metaopt.views import WIDEST_FOLDED, AllGradients, gradient_norm, pieces
from metaopt.wrapper import Closure, Wrapper

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class Stack(torch.optim.Optimizer):
    """A base optimizer with wrappers around it: one `step()`, one `state_dict()`.

    Made by `metaopt.build` and `metaopt.wrap`. `wrappers` are in written order; those that act on gradients act
    before the base, those that act on parameters after it.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        wrappers: Sequence[Wrapper] = (),
        *,
        schedules: Mapping[str, Schedule] | None = None,
        total_steps: int | None = None,
        metrics: Metrics | None = None,
        description: Any = None,
        fused_by_default: bool = False,
    ) -> None:
        self.base = base
        self.wrappers = tuple(wrappers)
        self.schedules = dict(schedules or {})
        self.total_steps = total_steps
        self.description = description
        self.fused_by_default = fused_by_default
        self.skipped: str | None = None
        self.load_report: loading.LoadReport | None = None
        self._own_metrics = metrics or Metrics()
        self._settle_structure()
        composition.check(self)
        # hooks registered on the base before it was wrapped fire once, with the stack as their argument
        for hooks in _HOOKS:
            setattr(self, hooks, getattr(base, hooks))
            setattr(base, hooks, OrderedDict())
        self._patch_step_function()
        self.set_aside = first_update.set_constructor_state_aside(base)
        self._built_with_rate = any(float(entry.get("lr", 0.0)) != 0.0 for entry in self.param_groups)
        for position, entry in enumerate(self.param_groups):
            composition.check_group(self, entry, position, built=True)
            composition.complete(self, entry)
        self._fix_timetables()

    # ---- structure that never changes after construction

    def _settle_structure(self) -> None:
        self.labelled = {wrapper.label: wrapper for wrapper in self.wrappers}
        acts = [(wrapper, wrapper.acts_on()) for wrapper in self.wrappers]
        self._around = [wrapper for wrapper, methods in acts if "around" in methods]
        self._on_gradients = [wrapper for wrapper, methods in acts if "on_gradients" in methods]
        self._after = [wrapper for wrapper, methods in acts if "after_update" in methods]
        self._stateful = any(wrapper.state_slots() for wrapper in self.wrappers)
        self._prefixes = tuple(f"{label}." for label in self.labelled)
        step = type(self.base).step
        # torch wraps the class's step to fire hooks; the stack's own step fires them already
        self._base_step: Callable[..., Any] = (
            getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step
        )
        closure = inspect.signature(self._base_step).parameters.get("closure")
        self.needs_closure = closure is not None and closure.default is inspect.Parameter.empty
        self.pending_scale: torch.Tensor | None = None
        self.measuring = False
        self.inside_averaged = False
        self._whole = -1  # how many parameters were found whole at the last look; -1: look again

    def _fix_timetables(self) -> None:
        """Write the value of every schedule for the update that comes next."""
        self._timetables = [Timetable(self.schedules, self.total_steps) for _ in self.param_groups]
        if self.schedules:
            for timetable, entry in zip(self._timetables, self.param_groups, strict=True):
                timetable.write(entry)

    # ---- shared with the base, also when a client rebinds them

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The live list of group dicts, the base's own."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups
        self._whole = -1

    @property
    def state(self) -> defaultdict[torch.Tensor, Any]:
        """The live mapping of parameter to state, the base's own."""
        return self.base.state

    @state.setter
    def state(self, state: defaultdict[torch.Tensor, Any]) -> None:
        self.base.state = state
        self._whole = -1

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's defaults."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    # ---- what a user reads

    @property
    def updates(self) -> int:
        """How many updates were applied: skipped steps do not count."""
        return int(self.param_groups[0]["metaopt.updates"])

    @property
    def spec(self) -> Any:
        """The stack as a pipeline with live values; `str(opt.spec)` is text that builds it again."""
        if self.description is None:
            raise StepError("this Stack was made without a description; metaopt.build and metaopt.wrap give one")
        return self.description.live(self)

    def scheduler(self) -> LRScheduler:
        """Return a torch scheduler that only reports, for clients that would otherwise make one of their own."""
        return ReportingScheduler(self)

    def record(self, **values: torch.Tensor | float) -> None:
        """Log values as `train/<name>` at the coming update, without waiting for the device."""
        for name, value in values.items():
            self._own_metrics.measure(f"train/{name}", value)

    def metrics(self) -> dict[str, float]:
        """Return the latest measurements as `{tag: float}`; waits for the device once."""
        return self._own_metrics.latest()

    def measure(self, tag: str, value: torch.Tensor | float) -> None:
        """Take one measurement under its whole tag, without waiting for the device."""
        self._own_metrics.measure(tag, value)

    def point_within(self, updates: int) -> bool:
        """Tell whether a point is logged after this update or before the one that follows `updates` later."""
        return self._own_metrics.wanted(self.updates, updates)

    def averaged(self, label: str | None = None) -> Any:
        """Return a context in which the parameters hold an average: `with opt.averaged(): validate(model)`.

        With several averages in the stack, `label` chooses. Before the first update the current weights stay.
        Raises StepError where the stack keeps no average or the choice is open.
        """
        return averaging.swapped(self, label)

    # ---- keys

    def is_base_key(self, key: str) -> bool:
        """Tell whether an entry of a group or of `state[p]` belongs to the base, not to a wrapper."""
        return not (isinstance(key, str) and key.startswith(self._prefixes)) if self._prefixes else True

    def anchors_nearer_than(self, mover: Wrapper) -> list[str]:
        """Return the state keys of the anchors of wrappers between the base and the one that moves."""
        nearer = self.wrappers[: self.wrappers.index(mover)]
        return [f"{w.label}.{n}" for w in nearer for n, slot in w.state_slots().items() if slot.kind == "anchor"]

    # ---- the update

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Make one update; return the closure's loss, or None without a closure.

        `skipped` says afterwards why no update was made, or is None. Raises ScheduleConflict, StepError.
        """
        self.skipped = None
        averaging.before_step(self)
        if closure is None and template.is_template_step(self):
            template.make_state(self)
            return None
        template.leave(self)
        for timetable, entry in zip(self._timetables, self.param_groups, strict=True):
            timetable.check(entry)
        self.measuring = self._own_metrics.wanted(self.updates + 1)
        run = evaluation.Evaluation(self, closure)
        loss = run.first()
        if not any(p.grad is not None for entry in self.param_groups for p in entry["params"]):
            self.skipped = "no gradients"
            self._own_metrics.drop_update()
            return loss
        self.filter_gradients()
        copies = self._copies_before_update()
        self._update_base(run)
        first_update.store_copies(self, copies)
        self._advance()
        self._after_update()
        self._finish(loss)
        return loss

    def filter_gradients(self) -> None:
        """Let the wrappers on gradients act, once per evaluation of the loss."""
        self.pending_scale = None
        if self.measuring:
            self._own_metrics.measure("train/grad_norm", gradient_norm(self))
        for wrapper in self._on_gradients:
            wrapper.on_gradients(AllGradients(self, wrapper))

    def evaluate_around(self, closure: Closure) -> Any:
        """Evaluate the loss, each wrapper that owns the evaluation around the next, the first one outermost."""
        for wrapper in reversed(self._around):
            closure = self._wrapped_closure(wrapper, closure)
        return closure()

    def _wrapped_closure(self, wrapper: Wrapper, closure: Closure) -> Closure:
        return lambda: wrapper.around(closure, AllGradients(self, wrapper))

    def _copies_before_update(self) -> first_update.Copies:
        state = self.state
        if not (self._stateful or self.set_aside or (self.fused_by_default and self.updates == 0)):
            return {}
        if self._whole == len(state) and self._whole == sum(len(entry["params"]) for entry in self.param_groups):
            return {}
        return first_update.take_copies(self)

    def _update_base(self, run: "evaluation.Evaluation") -> None:
        folded = self._fold_scale()
        try:
            if run.closure is not None:
                self.step_base(run.replay)
            else:
                self.step_base()
        finally:
            if folded:
                del self.base.grad_scale  # type: ignore[attr-defined]
        # a torch scheduler bound to the base before it was wrapped looks here
        self.base._opt_called = True  # type: ignore[attr-defined]
        self._whole = len(self.state)

    def step_base(self, *closure: Closure) -> None:
        """Call the base's own step, without the hooks that torch put around it: the stack fires those."""
        self._base_step(self.base, *closure)

    def lr_is_foreign(self, position: int) -> bool:
        """Tell whether the learning rate of a group was set from outside, since a schedule wrote it or it was built."""
        if "lr" in self.schedules:
            return not self._timetables[position].owns_values(self.param_groups[position])
        return self._built_with_rate

    def _fold_scale(self) -> bool:
        """Hand the pending factor to the base's fused kernel where it can take it, else multiply it in."""
        if self.pending_scale is None:
            return False
        foldable = (
            getattr(self.base, "_step_supports_amp_scaling", False)
            and not self.needs_closure
            and all(entry.get("fused") for entry in self.param_groups)
            and all(
                p.grad is None or (p.grad.element_size() <= WIDEST_FOLDED and not p.grad.is_sparse)
                for entry in self.param_groups
                for p in entry["params"]
            )
        )
        if not foldable:
            self.apply_scale()
            return False
        self.base.grad_scale = self.pending_scale.reciprocal().to(torch.float32)  # type: ignore[attr-defined]
        self.pending_scale = None
        return True

    def apply_scale(self) -> None:
        """Multiply the pending factor into the gradients, once."""
        factor, self.pending_scale = self.pending_scale, None
        if factor is None or not self._on_gradients:
            return
        for position in range(len(self.param_groups)):
            owners = [p for p in self.param_groups[position]["params"] if p.grad is not None]
            for piece in pieces(self, position, self._on_gradients[0], owners):
                gradients = piece.raw_grads
                torch._foreach_mul_(gradients, factor.to(gradients[0].device))

    def _advance(self) -> None:
        for entry in self.param_groups:
            entry["metaopt.updates"] += 1

    def _after_update(self) -> None:
        for wrapper in self._after:
            every = None if wrapper.every is None else f"{wrapper.label}.{wrapper.every}"
            for position, entry in enumerate(self.param_groups):
                if every is not None and entry["metaopt.updates"] % entry[every]:
                    continue
                for piece in pieces(self, position, wrapper, self.updated(entry, wrapper)):
                    wrapper.after_update(piece)

    def updated(self, entry: dict[str, Any], wrapper: Wrapper) -> list[torch.Tensor]:
        """Return the group's parameters that have been updated: those that hold the wrapper's state, if any."""
        state = self.state
        keys = [f"{wrapper.label}.{n}" for n, slot in wrapper.state_slots().items() if slot.kind != "moments"]
        if not keys:
            return [p for p in entry["params"] if p in state or p.grad is not None]
        return [p for p in entry["params"] if p in state and all(key in state[p] for key in keys)]

    def _finish(self, loss: Any) -> None:
        if self.measuring:
            self._measure_update(loss)
        if self.schedules:
            for timetable, entry in zip(self._timetables, self.param_groups, strict=True):
                timetable.write(entry)
        self._own_metrics.end_update(self.updates)

    def _measure_update(self, loss: Any) -> None:
        if isinstance(loss, torch.Tensor | float):
            self._own_metrics.measure("train/loss", loss)
        several = len(self.param_groups) > 1
        for position, entry in enumerate(self.param_groups):
            tag = f"train/learning_rate/{entry.get('name', position)}" if several else "train/learning_rate"
            if "lr" in entry:
                self._own_metrics.measure(tag, entry["lr"])

    def forget_base_state(self, owners: Sequence[torch.Tensor]) -> None:
        """Drop the base's entries of some parameters: its next update of them starts lazily."""
        for p in owners:
            held = self.state[p]
            for key in [key for key in held if self.is_base_key(key)]:
                del held[key]
        self._whole = -1

    # ---- groups, checkpoints, copies

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does; wrapper hyperparameters may stand in it under their labelled keys."""
        group = dict(param_group)
        composition.check_group(self, group, len(self.param_groups))
        before = set(self.state)
        self.base.add_param_group(group)
        for p in [p for p in self.state if p not in before]:
            self.set_aside[p] = self.state.pop(p)
        group["metaopt.updates"] = self.param_groups[0]["metaopt.updates"]
        composition.complete(self, group)
        self._fix_timetables()
        self._whole = -1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a stack's or a bare base's checkpoint, whole or not at all; `load_report` says what came of it.

        Raises CheckpointError, before anything changes, for another base, other groups, shapes or total steps.
        """
        loading.load(self, state_dict)
        self._fix_timetables()
        self._whole = -1
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        own = {k: v for k, v in self.__dict__.items() if k not in _DROPPED and k not in _HOOKS}
        base = {k: v for k, v in self.base.__dict__.items() if k not in _DROPPED and k not in _HOOKS}
        # a base's own __getstate__ would keep three attributes and lose the rest (L-BFGS could not step any more)
        return {"base_class": type(self.base), "base": base, "own": own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        base = state["base_class"].__new__(state["base_class"])
        base.__dict__.update(state["base"])
        self.__dict__.update(state["own"], base=base)
        for optimizer in (base, self):
            for hooks in _HOOKS:
                optimizer.__dict__[hooks] = OrderedDict()
        self._own_metrics = Metrics()
        self._settle_structure()
        self._patch_step_function()
        base._patch_step_function()
        self._fix_timetables()

    def __repr__(self) -> str:
        return f"Stack({self.description!r}, updates={self.updates})" if self.description else super().__repr__()


# rebuilt after a copy: structure derived from the parts, a step that a torch scheduler replaced, loggers
_DROPPED = frozenset(
    [
        "base",
        "step",
        "_opt_called",
        "_own_metrics",
        "labelled",
        "_around",
        "_on_gradients",
        "_after",
        "_base_step",
        "_timetables",
        "grad_scale",
        "found_inf",
    ]
)
