"""What a plugin can offer: each hook returns {name: class or factory}."""

from typing import Any

import pluggy

PROJECT = "metaopt"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

# kind of part -> the hook that offers it
HOOKS = {
    "optimizer": "metaopt_optimizers",
    "wrapper": "metaopt_wrappers",
    "schedule": "metaopt_schedules",
    "logger": "metaopt_loggers",
    "problem": "metaopt_problems",
}


@hookspec
def metaopt_optimizers() -> dict[str, Any]:  # type: ignore[empty-body]
    """Offer base optimizers: subclasses of torch.optim.Optimizer, unchanged, or factories of them."""


@hookspec
def metaopt_wrappers() -> dict[str, Any]:  # type: ignore[empty-body]
    """Offer wrappers: subclasses of metaopt.Wrapper."""


@hookspec
def metaopt_schedules() -> dict[str, Any]:  # type: ignore[empty-body]
    """Offer schedules: subclasses of metaopt.Schedule."""


@hookspec
def metaopt_loggers() -> dict[str, Any]:  # type: ignore[empty-body]
    """Offer loggers: subclasses of metaopt.Logger."""


@hookspec
def metaopt_problems() -> dict[str, Any]:  # type: ignore[empty-body]
    """Offer problems: subclasses of metaopt.Problem."""
