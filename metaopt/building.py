"""Making a stack: from a model and a pipeline, or around an optimizer that exists already."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any

import torch

from metaopt.composition import RUN_FLAGS, check_labels
from metaopt.errors import HyperparameterError, SpecError, did_you_mean
from metaopt.grouping import Group, as_groups
from metaopt.metrics import Metrics, as_logger
from metaopt.recording import describe_run
from metaopt.registry import registry
from metaopt.schedule import Schedule
from metaopt.spec import Part, Pipeline, as_pipeline
from metaopt.stack import Stack
from metaopt.wrapper import Wrapper

# what a group may hold besides hyperparameters of its parts
GROUP_KEYS = frozenset({"params", "param_names", "name", "lr_scale"})


def build(
    model_or_params: Any,
    spec_or_parts: Any,
    *,
    total_steps: int | None = None,
    log: Any = None,
    log_every: int = 50,
) -> Stack:
    """Return a stack over a module, parameters, `(name, parameter)` pairs or group dicts.

    `spec_or_parts` is text (`"clip_grad_norm(1.0) | adamw(lr=3e-4) | lookahead"`) or parts piped together.
    `total_steps` is the length of the run in updates, for schedules that run to its end. `log` is a directory,
    a SummaryWriter or a Logger, written every `log_every` updates. Raises MetaoptError.
    """
    pipeline = as_pipeline(spec_or_parts)
    base_part, wrappers = _arranged(pipeline)
    _check_total_steps(total_steps)
    groups = as_groups(model_or_params)
    schedules = _schedules(base_part, wrappers)
    _check_groups(groups, base_part, schedules)
    given = dict(base_part.given)
    for name, hyperparameter in base_part.hyperparameters.items():
        if hyperparameter.required and name not in given:
            raise HyperparameterError(f"{base_part.name} needs {name}: it has no default")
    for name, value in given.items():
        if isinstance(value, Schedule):
            given[name] = value.over(total_steps, total_steps)(0)
    fused = _fuse(groups, base_part, given)
    try:
        base = base_part.target(groups, **given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise HyperparameterError(f"{base_part.name}: {error}") from error
    _hint_at_decay(model_or_params, groups, base)
    return _stacked(base, wrappers, schedules, total_steps, log, log_every, Description(pipeline), fused)


def wrap(
    optimizer: torch.optim.Optimizer,
    spec_or_parts: Any,
    *,
    total_steps: int | None = None,
    log: Any = None,
    log_every: int = 50,
) -> Stack:
    """Return a stack around an optimizer that exists already, of any class; its state and groups stay its own.

    The parts have no base: those on gradients act before the optimizer, those on parameters after it, each in
    written order. `wrap(AdamW(model.parameters()), "lookahead(k=5)")`. Raises MetaoptError.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise SpecError(f"wrap() takes a torch.optim.Optimizer, not {type(optimizer).__name__}; build() takes a model")
    if isinstance(optimizer, Stack):
        raise SpecError("wrap(): this is a stack already: put all parts into one pipeline")
    pipeline = as_pipeline(spec_or_parts)
    bases = [part.name for part in pipeline if part.kind == "optimizer"]
    if bases:
        raise SpecError(
            f"wrap() is given an optimizer, so {bases[0]} is one too many; build() takes a base in the spec"
        )
    _check_total_steps(total_steps)
    wrappers = tuple(part.make() for part in pipeline)
    check_labels(wrappers)
    schedules = _schedules(None, wrappers)
    return _stacked(
        optimizer, wrappers, schedules, total_steps, log, log_every, Description(pipeline, wrapped=True), False
    )


@dataclass(frozen=True)
class Description:
    """The pipeline that a stack was made from; gives it back with the live values of its first group."""

    pipeline: Pipeline
    wrapped: bool = False

    def live(self, stack: Stack) -> Pipeline:
        """Return the pipeline with what the stack's groups hold now, schedules as schedules."""
        entry = stack.param_groups[0]
        parts = []
        for part in self.pipeline:
            prefix = "" if part.kind == "optimizer" else f"{part.label or part.name.rpartition('.')[2]}."
            parts.append(changed(part, given=_live(part, prefix, entry, stack.schedules)))
        if self.wrapped:
            name = registry.name_of(type(stack.base))
            base = Part("optimizer", name or type(stack.base).__name__, type(stack.base), registered=name is not None)
            given = {k: entry[k] for k in base.hyperparameters if k in entry and k not in RUN_FLAGS}
            before = sum(wrapper.stands_before_base() for wrapper in stack.wrappers)
            ordered = sorted(parts, key=lambda p: not p.make().stands_before_base())
            parts = [*ordered[:before], changed(base, given=given), *ordered[before:]]
        return Pipeline(tuple(parts))

    def __repr__(self) -> str:
        return repr(self.pipeline)


def _live(part: Part, prefix: str, entry: Mapping[str, Any], schedules: Mapping[str, Schedule]) -> dict[str, Any]:
    given = dict(part.given)
    for name, hyperparameter in part.hyperparameters.items():
        key = prefix + name
        if key in schedules:
            given[name] = schedules[key]
        elif key in entry and name not in RUN_FLAGS:
            value = entry[key]
            if name == "lr" and not prefix and entry["metaopt.lr_scale"] != 1.0:
                continue
            if name in given or value != hyperparameter.default:
                given[name] = value
    return given


def _arranged(pipeline: Pipeline) -> tuple[Part, tuple[Wrapper, ...]]:
    """Return the base and the wrappers in written order; raise SpecError for an order that cannot work."""
    bases = [position for position, part in enumerate(pipeline) if part.kind == "optimizer"]
    if len(bases) != 1:
        names = ", ".join(pipeline.parts[position].name for position in bases)
        raise SpecError(
            f"a stack has one base, this one has {len(bases)} ({names}): keep one of them"
            if bases
            else "a stack needs a base optimizer, such as adamw(lr=3e-4); metaopt.wrap takes one that exists already"
        )
    wrappers = []
    for position, part in enumerate(pipeline):
        if part.kind == "optimizer":
            continue
        wrapper = part.make()
        base = pipeline.parts[bases[0]].name
        if wrapper.stands_before_base() and position > bases[0]:
            raise SpecError(f"{wrapper.label} works on what {base} has used by then: write it before {base}")
        if not wrapper.stands_before_base() and position < bases[0]:
            raise SpecError(f"{wrapper.label} works on updated parameters: write it behind {base}")
        wrappers.append(wrapper)
    check_labels(tuple(wrappers))
    return pipeline.parts[bases[0]], tuple(wrappers)


def _schedules(base: Part | None, wrappers: tuple[Wrapper, ...]) -> dict[str, Schedule]:
    found = {} if base is None else {k: v for k, v in base.given.items() if isinstance(v, Schedule)}
    for wrapper in wrappers:
        own = {name: getattr(wrapper, name) for name in wrapper.hyperparameters}
        found.update({f"{wrapper.label}.{k}": v for k, v in own.items() if isinstance(v, Schedule)})
    return found


def _check_total_steps(total_steps: int | None) -> None:
    if total_steps is not None and (
        isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1
    ):
        raise HyperparameterError(f"total_steps={total_steps!r} is no number of updates: give an integer from 1 up")


def _check_groups(groups: list[Group], base: Part, schedules: Mapping[str, Schedule]) -> None:
    hyperparameters = base.hyperparameters
    for position, group in enumerate(groups):
        where = f"group {group.get('name', position)}"
        for key, value in group.items():
            if key in schedules:
                raise HyperparameterError(
                    f"{where} sets {key}={value!r}, but the stack has a schedule for it: "
                    f"use lr_scale in the group to scale the learning rate, or drop one of the two"
                )
            if key in hyperparameters:
                group[key] = hyperparameters[key].check(value, where=f"{where}, {base.name}")
            elif "." not in key and key not in GROUP_KEYS:
                raise HyperparameterError(
                    f"{where}: no part of this stack has {key!r}.{did_you_mean(key, hyperparameters)}"
                )


def _fuse(groups: list[Group], base: Part, given: dict[str, Any]) -> bool:
    """Choose the fused kernel where torch has one for every parameter, unless the user chose how to run."""
    if "fused" not in base.hyperparameters or not base.target.__module__.startswith("torch.optim."):
        return False
    chosen = RUN_FLAGS & (given.keys() | {key for group in groups for key in group})
    if chosen or any(isinstance(value, torch.Tensor) for value in given.values()):
        return False
    if not all(_fusible(p) for group in groups for p in group["params"]):
        return False
    try:
        base.target([torch.zeros(1, requires_grad=True)], **given, fused=True)
    except (RuntimeError, TypeError, ValueError):  # this class, or this choice of hyperparameters, has no fused kernel
        return False
    given["fused"] = True
    return True


def _fusible(p: torch.Tensor) -> bool:
    from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

    return p.device.type in _get_fused_kernels_supported_devices() and p.is_floating_point() and not p.is_sparse


_hinted = False


def _hint_at_decay(model: Any, groups: list[Group], base: torch.optim.Optimizer) -> None:
    global _hinted
    if _hinted or not isinstance(model, torch.nn.Module):
        return
    flat = sum(p.dim() <= 1 for group in base.param_groups if group.get("weight_decay") for p in group["params"])
    if flat:
        _hinted = True
        print(
            f"metaopt: weight_decay also acts on {flat} parameters of one dimension (biases, norms); "
            f"metaopt.groups(model, no_decay='1d') leaves them out",
            file=sys.stderr,  # standard output may carry JSON
        )


def _stacked(
    base: torch.optim.Optimizer,
    wrappers: tuple[Wrapper, ...],
    schedules: Mapping[str, Schedule],
    total_steps: int | None,
    log: Any,
    log_every: int,
    description: Description,
    fused: bool,
) -> Stack:
    logger = as_logger(log, lambda directory: registry.find("tensorboard", "logger").target(directory))
    metrics = Metrics(logger, every=log_every)
    stack = Stack(
        base,
        wrappers,
        schedules=schedules,
        total_steps=total_steps,
        metrics=metrics,
        description=description,
        fused_by_default=fused,
    )
    describe_run(stack)
    return stack
