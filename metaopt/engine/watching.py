"""What torch puts around every `step()` - hooks, a name for the profiler -, gone through only where someone looks."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import profiler
from torch.optim.optimizer import Optimizer, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

Step = TypeVar("Step", bound=Callable[..., Any])


def watched(step: Step) -> Step:
    """Return `step` with torch's own wrapper around it where a hook, the profiler or the compiler would see it.

    Else it would cost a quarter of an update of small tensors, and the one around the base's step is not there to
    pay for it.
    """
    as_torch_does = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or profiler._is_profiler_enabled
            or torch.compiler.is_compiling()
        ):
            return as_torch_does(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    # torch looks here before it puts its own around the class's step
    wrapper.hooked = True  # type: ignore[attr-defined]
    return wrapper  # type: ignore[return-value]


def unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a class's step without the wrappers of torch that fire hooks.

    Compiling anything in a process puts one more around the steps of some classes, marked like the one within.
    """
    while getattr(step, "hooked", False) and hasattr(step, "__wrapped__"):
        step = step.__wrapped__
    return step
