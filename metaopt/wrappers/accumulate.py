"""Gradient accumulation: one update for several batches."""

import torch

from metaopt import Groups, Wrapper, counter, hookimpl, hyper, zeros


class Accumulate(Wrapper):
    """sum <- sum + g at every `step()`; at every `steps`-th, g <- sum / steps makes the update and sum <- 0.

    It owns the gradients: it takes them away at every `step()`, so a loop may call `zero_grad()` or not; those that a
    GradScaler skips never come here, and are the loop's to clear. A parameter that had a gradient in an earlier window
    counts as having a zero one in a window without.
    """

    known_as = ("MultiSteps", "accumulate_grad_batches", "gradient_accumulation_steps", "grad_accum_steps")
    may_skip_updates = True

    steps: int = hyper(
        ge=1,
        doc="how many calls of step() make one update",
        known_as=("every_k_schedule", "gradient_accumulation_steps", "accumulate_grad_batches"),
        per_group=False,
    )
    sum = zeros(early=True, dtype="at least float32")
    seen = counter("how many gradients the sum holds")

    def on_gradients(self, groups: Groups) -> None:
        seen = groups.seen + 1
        if seen == 1:
            # here and not after the update: the mean that was lent for it is this very tensor
            for group in groups.groups_with_state():
                torch._foreach_zero_(group.sum)
        for group in groups:
            torch._foreach_add_(group.sum, group.grads)
        if seen < groups.steps:
            for group in groups:
                group.clear_grads()
            groups.set_counter("seen", seen)
            groups.skip_update(f"accumulated {seen} of {groups.steps}")
            return
        groups.set_counter("seen", 0)
        for group in groups.groups_with_state():
            torch._foreach_div_(group.sum, groups.steps)
            group.replace_grads(group.sum)


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"accumulate": Accumulate}
