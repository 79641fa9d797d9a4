"""Compose PyTorch optimizers: a base optimizer with wrappers around it, schedules and logging; every part a plugin."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

# what a type checker and an editor know is in __init__.pyi, written by `metaopt stubs --built-in --out .`
__version__ = "0.1.0"

# public name -> the module that defines it; nothing is imported before it is asked for, so that
# `metaopt --help` need not wait for torch
_HOMES = {
    "build": "construction.building",
    "wrap": "construction.building",
    "groups": "construction.grouping",
    "explain": "explaining.report",
    "scale_lr": "construction.lr_scaling",
    "save_snapshots": "ensembling",
    "ensemble": "ensembling",
    "register": "registry",
    "Optimizer": "construction.configured",
    "Stack": "stack",
    "Wrapper": "wrapper",
    "Group": "group",
    "Groups": "group",
    "elementwise": "rules",
    "hyper": "hyperparameters",
    "anchor": "slots",
    "start": "slots",
    "zeros": "slots",
    "moments": "slots",
    "previous": "slots",
    "counter": "slots",
    "number": "slots",
    "scalar": "slots",
    "history": "slots",
    "Partitioner": "engine.multi_base",
    "Sequencer": "engine.multi_base",
    "Schedule": "schedule",
    "Space": "space",
    "Tuner": "tuner",
    "Task": "tuner",
    "Tried": "tuner",
    "Logger": "logger",
    "Histogram": "logger",
    "Table": "logger",
    "Layout": "logger",
    "Margin": "logger",
    "Problem": "problem_class",
    "TensorProblem": "tensor_problem",
    "problem": "lab.own.making",
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
    "MissingExtra": "errors",
    "warn": "errors",
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
    spec = import_module("metaopt.specs.pipeline")
    errors = import_module("metaopt.errors")
    try:
        return spec.part(name)
    except errors.UnknownPart as error:
        raise AttributeError(f"module 'metaopt' has no attribute {name!r}: {error}") from None


def __dir__() -> list[str]:
    registry = import_module("metaopt.registry").registry
    return sorted({*globals(), *_HOMES, *(name for name in registry.names() if "." not in name)})
