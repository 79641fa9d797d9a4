"""Compose PyTorch optimizers: a base optimizer with wrappers around it, schedules and logging; every part a plugin."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaopt.batch_size import scale_lr as scale_lr
    from metaopt.building import build as build
    from metaopt.building import wrap as wrap
    from metaopt.configured import Optimizer as Optimizer
    from metaopt.engine.multi_base import Partitioner as Partitioner
    from metaopt.ensembling import ensemble as ensemble
    from metaopt.ensembling import save_snapshots as save_snapshots
    from metaopt.errors import CheckpointError as CheckpointError
    from metaopt.errors import HintWarning as HintWarning
    from metaopt.errors import HyperparameterError as HyperparameterError
    from metaopt.errors import LogError as LogError
    from metaopt.errors import MetaoptError as MetaoptError
    from metaopt.errors import MetaoptWarning as MetaoptWarning
    from metaopt.errors import ParameterError as ParameterError
    from metaopt.errors import PluginError as PluginError
    from metaopt.errors import ProblemError as ProblemError
    from metaopt.errors import ScheduleConflict as ScheduleConflict
    from metaopt.errors import SpecError as SpecError
    from metaopt.errors import StepError as StepError
    from metaopt.errors import UnknownPart as UnknownPart
    from metaopt.explaining import explain as explain
    from metaopt.grouping import groups as groups
    from metaopt.hooks import Example as Example
    from metaopt.hooks import hookimpl as hookimpl
    from metaopt.hyperparameters import hyper as hyper
    from metaopt.metrics import Logger as Logger
    from metaopt.problem import Problem as Problem
    from metaopt.registry import register as register
    from metaopt.schedule import Schedule as Schedule
    from metaopt.spec import Part
    from metaopt.stack import Stack as Stack
    from metaopt.wrapper import Group as Group
    from metaopt.wrapper import Groups as Groups
    from metaopt.wrapper import Wrapper as Wrapper
    from metaopt.wrapper import anchor as anchor
    from metaopt.wrapper import counter as counter
    from metaopt.wrapper import history as history
    from metaopt.wrapper import moments as moments
    from metaopt.wrapper import number as number
    from metaopt.wrapper import previous as previous
    from metaopt.wrapper import scalar as scalar
    from metaopt.wrapper import start as start
    from metaopt.wrapper import zeros as zeros

    # what an editor completes; at run time these come from the registry, like every other part
    adadelta: Part
    adafactor: Part
    adagrad: Part
    adam: Part
    adamax: Part
    adamw: Part
    asgd: Part
    lbfgs: Part
    muon: Part
    nadam: Part
    partition: Part
    radam: Part
    rmsprop: Part
    rprop: Part
    sgd: Part
    sparse_adam: Part
    accumulate: Part
    adaptive_grad_clip: Part
    cautious: Part
    cautious_decay: Part
    centralize: Part
    clip_grad_norm: Part
    clip_grad_value: Part
    clip_update_norm: Part
    clip_update_rms: Part
    decay: Part
    ema: Part
    ema_nesterov: Part
    flatten: Part
    gpa: Part
    gradient_noise: Part
    grokfast: Part
    hyperball: Part
    l2: Part
    lawa: Part
    lookahead: Part
    magma: Part
    mars: Part
    mechanic: Part
    orthograd: Part
    outer: Part
    plateau: Part
    radial_brake: Part
    sam: Part
    schedule_free: Part
    skip_nonfinite: Part
    skip_spikes: Part
    tail_average: Part
    trust_ratio: Part
    update_floor: Part
    zclip: Part
    constant: Part
    cosine: Part
    cosine_restarts: Part
    cyclic: Part
    exponential: Part
    inverse_sqrt: Part
    linear: Part
    multi_step: Part
    noam: Part
    one_cycle: Part
    polynomial: Part
    sequence: Part
    step_decay: Part
    warmup: Part
    wsd: Part

__version__ = "0.1.0"

# public name -> the module that defines it; nothing is imported before it is asked for, so that
# `metaopt --help` need not wait for torch
_HOMES = {
    "build": "building",
    "wrap": "building",
    "groups": "grouping",
    "explain": "explaining",
    "scale_lr": "batch_size",
    "save_snapshots": "ensembling",
    "ensemble": "ensembling",
    "register": "registry",
    "Optimizer": "configured",
    "Stack": "stack",
    "Wrapper": "wrapper",
    "Group": "wrapper",
    "Groups": "wrapper",
    "hyper": "hyperparameters",
    "anchor": "wrapper",
    "start": "wrapper",
    "zeros": "wrapper",
    "moments": "wrapper",
    "previous": "wrapper",
    "counter": "wrapper",
    "number": "wrapper",
    "scalar": "wrapper",
    "history": "wrapper",
    "Partitioner": "engine.multi_base",
    "Schedule": "schedule",
    "Logger": "metrics",
    "Problem": "problem",
    "Example": "hooks",
    "hookimpl": "hooks",
    "MetaoptError": "errors",
    "MetaoptWarning": "errors",
    "SpecError": "errors",
    "UnknownPart": "errors",
    "HyperparameterError": "errors",
    "ParameterError": "errors",
    "ScheduleConflict": "errors",
    "StepError": "errors",
    "CheckpointError": "errors",
    "PluginError": "errors",
    "LogError": "errors",
    "HintWarning": "errors",
    "ProblemError": "errors",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"metaopt.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name.startswith("_"):
        raise AttributeError(f"module 'metaopt' has no attribute {name!r}")
    if find_spec(f"metaopt.{name}") is not None:
        # `from metaopt import stack` asks here before it imports the module: the registry has no say in that
        return import_module(f"metaopt.{name}")
    spec = import_module("metaopt.spec")
    errors = import_module("metaopt.errors")
    try:
        return spec.part(name)
    except errors.UnknownPart as error:
        raise AttributeError(f"module 'metaopt' has no attribute {name!r}: {error}") from None


def __dir__() -> list[str]:
    registry = import_module("metaopt.registry").registry
    return sorted({*globals(), *_HOMES, *(name for name in registry.names() if "." not in name)})
