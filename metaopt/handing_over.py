"""What passes from a base to the stack around it, and what stays: its hooks, and what only it knows of its state."""

from collections import OrderedDict
from collections.abc import Callable
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


def move_hooks(base: torch.optim.Optimizer, stack: torch.optim.Optimizer) -> None:
    """Give the stack the hooks that users registered on the base: they fire once, with the stack as their argument.

    Those that the base's class registered for itself know nothing of a stack: they keep firing with the base.
    """
    for name in HOOKS:
        hooks: Hooks = getattr(base, name)
        own = {key for key, hook in hooks.items() if _is_own(hook, base)}
        if name in STEP_HOOKS:
            # around the bare step, which the stack calls, nothing fires
            moved = {key: partial(_with, hook, base) if key in own else hook for key, hook in hooks.items()}
            own = set()
        else:
            moved = {key: hook for key, hook in hooks.items() if key not in own}
        setattr(stack, name, OrderedDict(moved))
        setattr(base, name, OrderedDict((key, hook) for key, hook in hooks.items() if key in own))


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
