"""Stack: a base optimizer with wrappers around it, itself a `torch.optim.Optimizer`."""

import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from numbers import Real
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LRScheduler

from metaopt.compiled_step import CompiledStep
from metaopt.distributed.replicas import Replicas
from metaopt.engine import averages
from metaopt.engine.chain import Chain, ParamGroup
from metaopt.engine.checkpoint import loading
from metaopt.engine.checkpoint.report import Choice, LoadReport, changed_choice
from metaopt.engine.checkpoint.reset import reset
from metaopt.engine.exchange.outer_steps import exchange_of
from metaopt.engine.param_state.first_update import take_constructor_state
from metaopt.engine.param_state.placeholders import with_placeholders
from metaopt.engine.param_state.scratch import bases_undoing_moves
from metaopt.engine.run.groups import add_group, adopt_groups, complete_groups, know_members
from metaopt.engine.run.run import BaseStages, Run
from metaopt.engine.step.order import record, step
from metaopt.engine.structure import Structure
from metaopt.errors import HyperparameterError, LogError, ParameterError, StepError, did_you_mean
from metaopt.hyperparameters import plain
from metaopt.lr_reporter import ReadOnlyLRScheduler
from metaopt.metrics import Metrics
from metaopt.misuse.base import warn_of_bare_step, warn_of_undone_moves
from metaopt.misuse.left_out import LeftOut
from metaopt.misuse.second_clip import SecondClip
from metaopt.refusals import validate
from metaopt.schedule import Schedule
from metaopt.torch_internals import (
    HOOK_TABLES,
    call_without_grad,
    only_class_hooks,
    optimizer_parts,
    restored_optimizer,
    share_hooks,
    user_hooks,
    watch_step,
    with_step_hooks,
)
from metaopt.wrapper import Closure, Wrapper

# what a copy of a run cannot find out again
_REMEMBERED = (
    "constructor_state",
    "constructor_chains",
    "built_with_lr",
    "has_zero_shard",
    "own_schedules",
    "replicas",
    "stages",
)

# what explanations, checks and benchmarks ask of a stack; hidden from completion
_FOR_TOOLS = (
    "chain_of",
    "chains",
    "default_average",
    "description",
    "met_replicas",
    "needs_closure",
    "schedules_of",
    "takes_means",
)


class Stack(torch.optim.Optimizer):
    """A base optimizer with wrappers around it: one `step()`, one `state_dict()`.

    Made by `metaopt.build` and `metaopt.wrap`. `wrappers` are in written order; those that act on gradients act
    before the base, those that act on its update or on parameters after it.
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
        left_out: LeftOut | None = None,
        model: torch.nn.Module | None = None,
        stages: BaseStages | None = None,
        replicas: Replicas | None = None,
    ) -> None:
        self.description = description
        self.load_report: LoadReport | None = None
        self._choice = Choice()
        structure = Structure(base, wrappers, schedules or {}, total_steps, fused_by_default)
        self._run = Run(structure, base, metrics or Metrics())
        self._run.left_out = left_out
        self._run.stages = stages
        self._run.replicas = replicas or Replicas()
        self._run.exchange = exchange_of(self._run)
        self._run.model = None if model is None else weakref.ref(model)
        self._compiled_step = CompiledStep()
        validate(structure, base.param_groups)
        share_hooks(base, self)
        self._watch_base()
        self._patch_step_function()
        take_constructor_state(self._run)
        complete_groups(self._run)
        for placed in structure.observers:
            placed.wrapper.validate_names(list(self._run.names().values()))
        clips = [w.label for chain in structure.chains for w in chain.ordered if w.clips_gradients]
        if clips and not self._run.has_zero_shard:
            self._run.second_clip = SecondClip(base.param_groups, list(dict.fromkeys(clips)))
        for chain, movers in bases_undoing_moves(structure.chains, base.param_groups, only_modes=True):
            warn_of_undone_moves(chain.base, movers)

    # ---- shared with the base, also if a client replaces them

    @property
    def base(self) -> torch.optim.Optimizer:
        """The base optimizer."""
        return self._run.base

    @property
    def param_groups(self) -> list[ParamGroup]:
        """The live list of group dicts, the base's own."""
        return self._run.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[ParamGroup]) -> None:
        self._run.base.param_groups = groups
        adopt_groups(self._run)

    @property
    def state(self) -> defaultdict[torch.Tensor, Any]:
        """The live mapping of parameter to state, the base's own."""
        return self._run.base.state

    @state.setter
    def state(self, state: defaultdict[torch.Tensor, Any]) -> None:
        self._run.base.state = state
        self._run.invalidate()

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's defaults."""
        return self._run.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self._run.base.defaults = defaults

    # ---- what a user reads

    @property
    def wrappers(self) -> tuple[Wrapper, ...]:
        """The wrappers around all bases, in written order."""
        return self._run.structure.wrappers

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The schedules of the whole stack, by the key of the group entry that each drives."""
        return self._run.structure.schedules

    @property
    def chains(self) -> tuple[Chain, ...]:
        """The bases with the wrappers that act on their groups: one, or one for each part of a partition."""
        return self._run.structure.chains

    @property
    def total_steps(self) -> int | None:
        """The length of the run in updates, if it was given."""
        return self._run.structure.total_steps

    @property
    def needs_closure(self) -> bool:
        """Whether the base evaluates the loss itself."""
        return self._run.structure.needs_closure

    @property
    def updates(self) -> int:
        """How many updates were made; skipped steps do not count. Schedules follow a count that is set."""
        return self._run.updates

    @updates.setter
    def updates(self, number: int) -> None:
        adopt_groups(self._run)
        self._run.count_from(number)

    @property
    def skipped(self) -> str | None:
        """Why the last `step()` made no update, or None."""
        return self._run.skipped

    @property
    def averages(self) -> tuple[str, ...]:
        """The labels of the averages that `averaged` and `averaged_module` can show, in the order of the parts."""
        return tuple(self._run.structure.averages())

    @property
    def default_average(self) -> str | None:
        """The label of what `averaged()` shows unasked; None without averages, or if bases keep different ones."""
        return self._run.structure.default_average()

    @property
    def spec(self) -> Any:
        """The stack as a pipeline with live values; `str(opt.spec)` is text that builds it again."""
        if self.description is None:
            raise StepError("this Stack was made without a description; metaopt.build and metaopt.wrap give one")
        return self.description.live(self)

    def chain_of(self, group: ParamGroup) -> Chain:
        """Return the base, with its wrappers, that a group belongs to."""
        return self._run.structure.chain_of(group)

    def schedules_of(self, group: ParamGroup) -> dict[str, Schedule]:
        """Return the schedules that drive a group's entries, by key."""
        return self._run.schedules_of(group)

    def scheduler(self) -> LRScheduler:
        """Return a torch scheduler that only reports, for clients that would otherwise make one of their own."""
        return ReadOnlyLRScheduler(self)

    # ---- the log

    @property
    def log(self) -> Metrics:
        """What is measured, and where it is written."""
        return self._run.metrics

    def record(
        self,
        values: Mapping[str, torch.Tensor | float] | None = None,
        /,
        *,
        step: int | None = None,
        **named: torch.Tensor | float,
    ) -> None:
        """Log values, without waiting for the device: `opt.record(loss=loss)`, `opt.record({"val/loss": loss})`.

        A plain name is measured at the coming update and logged as `train/<name>`, as the mean over the updates since
        the point before. A name with a slash is a tag of your own: each value is a point, at the number of updates made
        so far. `step` says where else; a plain name is then a point too. A run that is resumed hides points of later
        steps than its own, so another unit than updates needs another log. Parts that act on a value, such as
        `plateau`, see it at once: those read it. Raises LogError.
        """
        if values is not None and not isinstance(values, Mapping):
            raise LogError(f"record(): values must be a dict of numbers by name, got {type(values).__name__}")
        step = plain(step)
        if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
            raise LogError(f"record(): step must be an integer >= 0, got {step!r:.60}")
        metrics, updates = self._run.metrics, self._run.updates
        for name, value in {**(values or {}), **named}.items():
            if step is None and "/" not in name:
                metrics.record(f"train/{name}", value)
            else:
                tag = name if "/" in name else f"train/{name}"
                metrics.point(tag, value, updates if step is None else step, updates)
            if self._run.structure.on_record:
                record(self._run, name, value)

    def metrics(self) -> dict[str, float]:
        """Return the latest measurements as `{tag: float}`; waits for the device."""
        return self._run.metrics.latest()

    def close(self) -> None:
        """Write the last measurements and close the log; training may go on without one. Raises LogError."""
        self._run.metrics.close()

    # ---- the update

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the base does; after a load from inside `averaged()` the weights return."""
        averages.before_gradients(self._run)
        if type(self.base).zero_grad is torch.optim.Optimizer.zero_grad:
            super().zero_grad(set_to_none)  # the profiler sees the stack's name
        else:
            self.base.zero_grad(set_to_none)

    @with_step_hooks
    def step(self, closure: Closure | None = None, **keywords: Any) -> Any:
        """Make one update; return the closure's loss, or without a closure what the base's step returns.

        Keywords go to the base's step. `skipped` says afterwards why no update was made, or is None. Raises
        ScheduleConflict, StepError.
        """
        if torch.compiler.is_compiling():
            return self._compiled_step(self._run, closure, keywords)
        if self._run.is_differentiable:
            return step(self._run, closure, keywords)
        return call_without_grad(step, self._run, closure, keywords)

    def weigh(self, weight: float | torch.Tensor) -> None:
        """Let the gradients of the coming `step()` count `weight` times beside the others of their update.

        With `accumulate` the update is then the mean over tokens, if the weight is the batch's number of tokens and its
        loss a mean over them; on several ranks all must give the same number. A step that is not weighed counts once.
        Without `accumulate` an update is made of one step, and its weight changes nothing. Raises StepError.
        """
        if isinstance(weight, torch.Tensor):
            if weight.numel() != 1 or weight.is_complex():
                raise StepError(f"weigh(): the weight must be one real number, got a tensor of {tuple(weight.shape)}")
            self._run.step_weight = weight.detach().reshape(()).clone()  # not read: that would wait for the device
            return
        if isinstance(weight, bool) or not isinstance(weight, Real) or not 0.0 < float(weight) < float("inf"):
            raise StepError(f"weigh(): the weight must be a positive number, got {weight!r:.60}")
        self._run.step_weight = float(weight)

    def flush(self) -> bool:
        """Make the update of a window that is not complete, at the end of an epoch or of the run; see `accumulate`.

        It divides by what the window holds. Gradients that no `step()` has seen count too. Returns whether there was
        something to make an update of: without `accumulate` there never is. Raises what `step()` does.
        """
        if not any(wrapper.spans_steps for wrapper in self.wrappers):
            return False
        before = self.updates
        self._run.flushing = True
        try:
            self.step()
        finally:
            self._run.flushing = False
        return self.updates > before

    def join_replicas(self) -> bool:
        """Agree with the other replicas on the weights; all of them must call it. Return whether these are new here.

        The first `step()` does so if it was not called. Replicas that have made no step take the weights of the first
        one. One that joins others late, with fewer steps than they, takes their outer weights, their momentum and their
        counts; its base begins anew. Does nothing where no part has `across="replicas"`. Raises StepError for
        replicas of different models or settings.
        """
        adopt_groups(self._run)
        return self._run.exchange is not None and self._run.exchange.join()

    @property
    def takes_means(self) -> bool:
        """Whether a part takes means over replicas: one with `across="replicas"`."""
        return self._run.exchange is not None

    @property
    def met_replicas(self) -> bool:
        """Whether the last `step()` had an outer step over all replicas: the same answer on all of them."""
        return self._run.exchange is not None and self._run.exchange.was_due

    def train(self, mode: bool = True) -> None:
        """Call the base's `train()` if it has one (schedule-free optimizers do); averages of wrappers stay."""
        for chain in self.chains:
            chain.call_mode("train" if mode else "eval")

    def eval(self) -> None:
        """Call the base's `eval()` if it has one: a schedule-free optimizer then shows its average."""
        self.train(False)

    def averaged(
        self, label: str | None = None, *, model: torch.nn.Module | None = None
    ) -> AbstractContextManager[None]:
        """Return a context in which the parameters hold an average: `with opt.averaged(): validate(model)`.

        Of several averages in the stack (`opt.averages`) `label` chooses one; the default is the last one written.
        Before the first update the current weights stay. Afterwards the weights come back bit for bit, and the buffers
        of the model too (statistics of batch norm, which `torch.optim.swa_utils.update_bn` may have set for the
        average): of the one that the stack was built over, or of `model`. Raises StepError if the stack keeps no
        average or none of this label.
        """
        adopt_groups(self._run)
        return averages.averages_shown(self._run, label, self._known_model(model))

    def averaged_module(
        self, model: torch.nn.Module | None = None, label: str | None = None, *, out: torch.nn.Module | None = None
    ) -> torch.nn.Module:
        """Return a copy of the model that holds an average and shares nothing: to evaluate, as a teacher, to export.

        The weights stay where they are, so it can be called at any moment of a training step. The copy is in the
        model's mode (`train()` or `eval()`), and its parameters require no gradients. Its buffers are the model's: give
        batch norm the average's own with `torch.optim.swa_utils.update_bn(loader, copy)`. `model` defaults to the one
        that the stack was built over, `label` as for `averaged`. `out`, an earlier copy, is written to instead.
        Raises StepError, ParameterError.
        """
        adopt_groups(self._run)
        known = self._known_model(model)
        if known is None:
            raise StepError("averaged_module(): the stack was not built over a module: give it, averaged_module(model)")
        return averages.copied_with_averages(self._run, known, label, out)

    def _known_model(self, given: torch.nn.Module | None) -> torch.nn.Module | None:
        if given is not None and not isinstance(given, torch.nn.Module):
            raise StepError(f"model must be a torch.nn.Module, got {type(given).__name__}")
        return given if given is not None or self._run.model is None else self._run.model()

    def reset_state(self, *names: str) -> None:
        """Forget what was gathered, for fine-tuning from a checkpoint; without names everything.

        A name is "moments" (the base's state), "averages" (what all wrappers keep), "counters" (updates and with them
        schedules begin at 0) or a wrapper's label. What is forgotten starts at the next update as in a new run.
        Raises StepError.
        """
        adopt_groups(self._run)
        reset(self._run, names)

    def scale_lr(self, factor: float, group: str | None = None) -> None:
        """Multiply the learning rate by a factor, in the middle of a run: of all groups, or of those called `group`.

        A schedule goes on times the factor, which is in the checkpoint. Most torch schedulers compute their rates anew:
        change the scheduler instead. Raises HyperparameterError, ParameterError.
        """
        if isinstance(factor, bool) or not isinstance(factor, Real) or not 0.0 < float(factor) < float("inf"):
            raise HyperparameterError(f"scale_lr(): the factor must be a number > 0, got {factor!r:.60}")
        adopt_groups(self._run)
        groups = self.param_groups
        chosen = [i for i, own in enumerate(groups) if group is None or own.get("name") == group]
        if not chosen:
            names = [str(own["name"]) for own in groups if "name" in own]
            raise ParameterError(
                f"scale_lr(): no group is called {group!r}.{did_you_mean(str(group), names)} "
                f"The groups are called: {', '.join(names) or 'nothing'}"
            )
        if any(groups[i].get("lr") is None for i in chosen):
            raise HyperparameterError(f"scale_lr(): {type(self.base).__name__} has no learning rate to scale")
        for i in chosen:
            self._run.scheduled[i].scale_rate(groups[i], float(factor))

    # ---- groups, checkpoints, copies

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group, as torch does; it may hold wrapper hyperparameters under their labelled keys."""
        add_group(self._run, param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that matters to the next update, in torch's form; the live state does not change."""
        base = self._run.base
        adopt_groups(self._run)
        self._run.adopt_rates()
        self._run.await_copies()
        # what was recorded before a checkpoint must not be missing in the log after it
        self._run.metrics.write_points()
        if self._run.exchange is not None:
            self._run.exchange.settle()
        for pre_hook in user_hooks(self._optimizer_state_dict_pre_hooks, base):
            pre_hook(self)
        # through the base: some write more than torch does
        with only_class_hooks(base):
            state_dict = base.state_dict()
        state_dict = with_placeholders(self._run, state_dict)
        for post_hook in user_hooks(self._optimizer_state_dict_post_hooks, base):
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(
        self,
        state_dict: dict[str, Any],
        *,
        keep: Literal["live", "saved"] | None = None,
        extend: bool | None = None,
        names: Iterable[Any] | None = None,
    ) -> None:
        """Load a stack's or a bare base's checkpoint, whole or not at all; `load_report` says what came of it.

        Scheduled values follow this stack's schedules at the loaded count. Constants are the checkpoint's, with one
        warning that lists those that differ; `keep="saved"` takes them without it, `keep="live"` keeps this stack's.
        `extend=True` allows a checkpoint of a run with other `total_steps`. Parameters are matched by name; `names`
        gives those of a checkpoint that has none, in its order: `names=model.named_parameters()`. What is not given
        is as `resume_with` said. Raises CheckpointError for another base or other shapes, for parameters that cannot
        be matched, and for other total steps if schedules depend on them; the stack is then as before.
        """
        base, choice = self._run.base, changed_choice(self._choice, keep, extend, names)
        adopt_groups(self._run)
        state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
        for pre_hook in user_hooks(self._optimizer_load_state_dict_pre_hooks, base):
            state_dict = pre_hook(self, state_dict) or state_dict
        stages = self._run.stages
        undo = None if stages is None else stages.prepare_load(self._run, state_dict)
        try:
            self.load_report = loading.load(self._run, state_dict, choice)
        except BaseException:
            if undo is not None:
                undo()
            raise
        if self._run.exchange is not None:
            self._run.exchange.forget()
        self._run.invalidate()
        for hook in user_hooks(self._optimizer_load_state_dict_post_hooks, self._run.base):
            hook(self)
        self.load_report.warn(choice)

    def resume_with(self, *, keep: Literal["live", "saved"] | None = None, extend: bool | None = None) -> "Stack":
        """Choose how `load_state_dict` loads if a client calls it, as trainers do; return the stack.

        `return metaopt.build(model, spec, total_steps=2000).resume_with(extend=True)`. The arguments are those of
        `load_state_dict`. Raises CheckpointError for a `keep` that does not exist.
        """
        self._choice = changed_choice(self._choice, keep, extend, None)
        return self

    def __getstate__(self) -> dict[str, Any]:
        structure = self._run.structure
        adopt_groups(self._run)
        self._run.adopt_rates()
        self._run.await_copies()
        if self._run.exchange is not None:
            self._run.exchange.settle()
        parts = {
            name: getattr(structure, name) for name in ("wrappers", "schedules", "total_steps", "fused_by_default")
        }
        memory = {name: getattr(self._run, name) for name in _REMEMBERED}
        # a copy logs nowhere, and has no hooks, as torch's own copies
        derived = {"_run", "_compiled_step", "step", "_opt_called", *HOOK_TABLES}
        own = {key: value for key, value in self.__dict__.items() if key not in derived}
        return {"base": optimizer_parts(self._run.base), "parts": parts, "memory": memory, "own": own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state["own"])
        base = restored_optimizer(*state["base"])
        self._run = Run(Structure(base, **state["parts"]), base, Metrics())
        vars(self._run).update(state["memory"])
        self._run.exchange = exchange_of(self._run)
        self._compiled_step = CompiledStep()
        share_hooks(base, self)
        self._watch_base()
        self._patch_step_function()
        know_members(self._run)
        self._run.begin_schedules()

    def _watch_base(self) -> None:
        alive = weakref.ref(self)
        told: list[bool] = []

        def seen() -> None:
            stack = alive()
            if stack is not None and not told:
                told.append(True)
                warn_of_bare_step(stack.base, stack.wrappers)

        watch_step(self._run.base, seen)

    def __dir__(self) -> list[str]:
        """Return what a user needs, for completion: not what the engine and torch keep on optimizers for themselves."""
        hidden = {"OptimizerPreHook", "OptimizerPostHook", "profile_hook_step", *_FOR_TOOLS}
        return [name for name in super().__dir__() if name not in hidden and (name[:1] != "_" or name[:2] == "__")]

    def __repr__(self) -> str:
        # in torch's form; the engine's own entries tell a reader nothing
        lines = super().__repr__().partition("(")[2].lstrip().splitlines()
        groups = "\n".join(line for line in lines if not line.startswith("    metaopt."))
        pipeline = self.description.text_over(self.base) if self.description else type(self.base).__name__
        return f"Stack({pipeline}, updates={self.updates}\n{groups}"
