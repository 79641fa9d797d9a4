"""What passes from a base to the stack around it, and what stays: its hooks, and what only it knows of its state."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
CHECKPOINT_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
# every optimizer has them
HOOKS = (*STEP_HOOKS, *CHECKPOINT_HOOKS)

Hooks = OrderedDict[int, Callable[..., Any]]


def share_hooks(base: torch.optim.Optimizer, stack: torch.optim.Optimizer) -> None:
    """Let base and stack have the same hooks, whichever a user registers them on: they fire once, with the stack.

    Those that the base's class registered for itself know nothing of a stack: they keep firing with the base.
    """
    for name in HOOKS:
        hooks: Hooks = getattr(base, name)
        if name in STEP_HOOKS:
            # around the bare step, which the stack calls, nothing fires
            hooks.update({key: partial(_with, hook, base) for key, hook in hooks.items() if _is_own(hook, base)})
        setattr(stack, name, hooks)


def of_users(hooks: Hooks, base: torch.optim.Optimizer) -> list[Callable[..., Any]]:
    """Return the hooks that the base's class did not register for itself."""
    return [hook for hook in hooks.values() if not _is_own(hook, base)]


@contextmanager
def own_hooks_alone(base: torch.optim.Optimizer) -> Iterator[None]:
    """Let only the hooks of the base's class fire for it: those of users fire for the stack."""
    shared = {name: getattr(base, name) for name in CHECKPOINT_HOOKS}
    for name, hooks in shared.items():
        setattr(base, name, OrderedDict((key, hook) for key, hook in hooks.items() if _is_own(hook, base)))
    try:
        yield
    finally:
        vars(base).update(shared)


def own_hooks(base: torch.optim.Optimizer) -> dict[str, Hooks]:
    """Return the hooks of checkpoints that the base's class registered for itself, by the attribute that holds them."""
    found = {name: getattr(base, name) for name in CHECKPOINT_HOOKS}
    return {
        name: OrderedDict((key, hook) for key, hook in hooks.items() if _is_own(hook, base) and not _is_bound(hook))
        for name, hooks in found.items()
    }


def _is_bound(hook: Callable[..., Any]) -> bool:
    return getattr(hook, "__self__", None) is not None


def _is_own(hook: Callable[..., Any], base: torch.optim.Optimizer) -> bool:
    if getattr(hook, "__self__", None) is base:
        return True
    declared = [value for kind in type(base).__mro__ for value in vars(kind).values()]
    return any(hook is value or hook is getattr(value, "__func__", None) for value in declared)


def _with(hook: Callable[..., Any], base: torch.optim.Optimizer, stack: Any, *rest: Any) -> Any:
    return hook(base, *rest)
