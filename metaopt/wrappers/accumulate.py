"""Gradient accumulation: one update for several batches."""

import torch

from metaopt import Group, Groups, Wrapper, counter, hookimpl, hyper, scalar, zeros


class Accumulate(Wrapper):
    """sum <- sum + w g at every `step()`; at every `steps`-th, g <- sum / (sum of all w) makes the update, sum <- 0.

    w is 1, or what `opt.weigh(w)` was given before the step: the number of tokens in a batch makes the update that of
    all tokens, where batches are unequal. `opt.flush()` makes the update of an incomplete window, at the end of an
    epoch. It owns the gradients: it takes them away at every `step()`, so a loop may call `zero_grad()` or not; those
    that a GradScaler skips never come here, and are the loop's to clear. A parameter that had a gradient in an earlier
    window counts as having a zero one in a window without.
    """

    known_as = ("MultiSteps", "accumulate_grad_batches", "gradient_accumulation_steps", "grad_accum_steps")
    may_skip_updates = True
    spans_steps = "steps"

    steps: int = hyper(
        ge=1,
        doc="how many calls of step() make one update",
        known_as=("every_k_schedule", "gradient_accumulation_steps", "accumulate_grad_batches"),
        per_group=False,
    )
    sum = zeros(early=True, dtype="at least float32")
    seen = counter("how many gradients the sum holds")
    # beyond one for each gradient: a checkpoint without it is one of steps that were not weighed
    extra_weight = scalar(0.0, per="run", doc="the weights in the sum, less one for each gradient")

    def on_gradients(self, groups: Groups) -> None:
        fresh = list(groups)
        seen = groups.seen + bool(fresh)
        if seen == 0:
            groups.skip_update("nothing accumulated")
            return
        if groups.seen == 0:
            # here and not after the update: the mean that was lent for it is this very tensor
            for group in groups.groups_with_state():
                torch._foreach_zero_(group.sum)
            groups.extra_weight.zero_()
        for group in fresh:
            _add(group, groups.step_weight)
        if fresh and (isinstance(groups.step_weight, torch.Tensor) or groups.step_weight != 1.0):
            groups.extra_weight.add_(groups.step_weight - 1.0)
        if seen < groups.steps and not groups.is_flush:
            for group in fresh:
                group.clear_grads()
            groups.set_counter("seen", seen)
            groups.skip_update(f"accumulated {seen} of {groups.steps}")
            return
        groups.set_counter("seen", 0)
        total = groups.extra_weight + seen
        for group in groups.groups_with_state():
            torch._foreach_div_(group.sum, total.to(group.sum[0].device))
            group.replace_grads(group.sum)


def _add(group: Group, weight: float | torch.Tensor) -> None:
    if isinstance(weight, torch.Tensor):
        weight = weight.to(group.sum[0].device)
        for total, gradient in zip(group.sum, group.grads, strict=True):
            total.addcmul_(gradient.to(total.dtype), weight.to(total.dtype))
    else:
        torch._foreach_add_(group.sum, group.grads, alpha=weight)


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"accumulate": Accumulate}
