"""Making a stack: from a model and a pipeline, or around an optimizer that exists already."""

from typing import Any

import torch

from metaopt.construction.describing import Description
from metaopt.construction.grouping import as_groups, find_left_out, module_of
from metaopt.construction.making import arrange, make_base, make_partition, scheduled
from metaopt.construction.run_description import describe_run
from metaopt.construction.staging import Stages
from metaopt.distributed.replicas import Replicas
from metaopt.errors import HintWarning, HyperparameterError, SpecError, warn
from metaopt.hyperparameters import plain
from metaopt.metrics import Metrics, as_logger
from metaopt.misuse.no_hook import warn_of_no_hook
from metaopt.refusals import validate_labels
from metaopt.registry import registry
from metaopt.specs.pipeline import as_pipeline
from metaopt.specs.spaces import refuse_spaces
from metaopt.stack import Stack


def build(
    model_or_params: Any,
    spec: Any,
    *,
    total_steps: int | None = None,
    log: Any = None,
    log_every: int | None = None,
    exact: bool = False,
    replicas: Any = None,
) -> Stack:
    """Return a stack over a module, parameters, `(name, parameter)` pairs or group dicts.

    `spec` is text (`"clip_grad_norm(1.0) | adamw(lr=3e-4) | lookahead"`), parts piped together, or lists and
    dicts from a configuration file. `total_steps` is the length of the run in updates, for schedules that run to its
    end. `log` is a directory, a SummaryWriter or a Logger, written every `log_every` updates (50). torch's fused kernel
    is used if it has one for all parameters and nothing says how to run; it may differ from torch's default loop in the
    last digits. `exact=True` runs the base as torch does by default, bit for bit. `replicas` is the process group,
    or the device mesh of one dimension, over which parts with `across="replicas"` take means; by default that of all
    processes. Raises MetaoptError.
    """
    stack = Stack(
        **stack_arguments(model_or_params, spec, total_steps, log, log_every, exact),
        replicas=Replicas(replicas),
    )
    describe_run(stack)
    return stack


def stack_arguments(
    model_or_params: Any, spec: Any, total_steps: int | None, log: Any, log_every: int | None, exact: bool
) -> dict[str, Any]:
    """Return what `Stack` is made from, for the arguments of `build`."""
    total_steps = plain(total_steps)
    model = module_of(model_or_params)
    pipeline = as_pipeline(spec)
    base_part, wrappers = arrange(pipeline)
    _check_total_steps(total_steps)
    groups = as_groups(model_or_params)
    schedules, stages = scheduled(None, wrappers), None
    if base_part.is_partition:
        base: torch.optim.Optimizer = make_partition(groups, base_part, wrappers, total_steps, exact)
        fused = False
    elif base_part.is_sequence:
        stages = Stages(base_part, wrappers, total_steps, exact)
        base, fused = stages.begin(groups)
        wrappers, schedules = stages.stages[0].wrappers, stages.stages[0].schedules
    else:
        schedules = scheduled(base_part, wrappers)
        base, fused = make_base(groups, base_part, schedules, total_steps, around=wrappers, exact=exact)
    _hint_at_decay(model_or_params, base)
    return {
        "base": base,
        "wrappers": wrappers,
        "schedules": schedules,
        "total_steps": total_steps,
        "metrics": _metrics(log, log_every),
        "description": Description(pipeline),
        "fused_by_default": fused,
        "left_out": find_left_out(model_or_params),
        "model": model,
        "stages": stages,
    }


def wrap(
    optimizer: torch.optim.Optimizer,
    spec: Any,
    *,
    total_steps: int | None = None,
    log: Any = None,
    log_every: int | None = None,
    replicas: Any = None,
) -> Stack:
    """Return a stack around an optimizer that exists already, of any class; its state and groups stay its own.

    The parts have no base: those on gradients act before the optimizer, those on parameters after it, each in
    written order. `wrap(AdamW(model.parameters()), "lookahead(k=5)")`. Raises MetaoptError.
    """
    if isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer):
        name = optimizer.__name__
        raise SpecError(
            f"wrap() takes an optimizer, got the class {name}: write wrap({name}(model.parameters(), ...), ...)"
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise SpecError(f"wrap() takes a torch.optim.Optimizer, not {type(optimizer).__name__}; build() takes a model")
    if isinstance(optimizer, Stack):
        raise SpecError("wrap(): this is a stack already: put all parts into one pipeline")
    total_steps = plain(total_steps)
    pipeline = as_pipeline(spec)
    bases = [part.name for part in pipeline if part.kind == "optimizer"]
    if bases:
        raise SpecError(
            f"wrap() is given an optimizer, so {bases[0]} is one too many; build() takes a base in the spec"
        )
    _check_total_steps(total_steps)
    refuse_spaces(pipeline)
    wrappers = tuple(part.build_wrapper() for part in pipeline)
    validate_labels(wrappers)
    warn_of_no_hook(wrappers)
    for wrapper in wrappers:
        if wrapper.adapt_base(type(optimizer)) is not type(optimizer):
            raise SpecError(
                f"wrap(): {wrapper.label} changes how {type(optimizer).__name__} is made: use metaopt.build"
            )
    stack = Stack(
        optimizer,
        wrappers,
        schedules=scheduled(None, wrappers),
        total_steps=total_steps,
        metrics=_metrics(log, log_every),
        description=Description(pipeline, wrapped=True),
        replicas=Replicas(replicas),
    )
    describe_run(stack)
    return stack


def _check_total_steps(total_steps: int | None) -> None:
    if total_steps is not None and (
        isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1
    ):
        raise HyperparameterError(f"total_steps must be an integer >= 1 (updates), got {total_steps!r}")


def _hint_at_decay(model: Any, base: torch.optim.Optimizer) -> None:
    if not isinstance(model, torch.nn.Module):
        return
    flat = sum(p.dim() <= 1 for group in base.param_groups if group.get("weight_decay") for p in group["params"])
    if flat:
        warn(
            f"weight_decay also acts on {flat} parameter{'s' if flat > 1 else ''} of one dimension (biases, norms); "
            f"metaopt.groups(model, no_decay='1d') leaves them out. Warnings of the class metaopt.HintWarning "
            f"can be filtered",
            HintWarning,
        )


def _metrics(log: Any, log_every: int | None) -> Metrics:
    logger = as_logger(log, lambda directory: registry.find("tensorboard", "logger").target(directory))
    return Metrics(logger, every=plain(log_every), asked=log is not None)
