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
        begins = groups.seen == 0
        if begins:
            # here and not with the update, which may fail
            for group in groups.groups_with_state():
                pairs = zip(group.parameters, group.sum, strict=True)
                if without := [s for p, s in pairs if p.grad is None]:
                    torch._foreach_zero_(without)
            groups.extra_weight.zero_()
        weight = groups.step_weight
        weighs = bool(fresh) and not _is_one(weight)
        if seen < groups.steps and not groups.is_flush:
            for group in fresh:
                _add(group, group.sum, group.grads, weight, begins=begins)
                group.clear_grads()
            if weighs:
                groups.extra_weight.add_(weight - 1.0)
            groups.set_counter("seen", seen)
            groups.skip_update(f"accumulated {seen} of {groups.steps}")
            return
        # the sum stays as it is: if the update fails, the window is what it was before this step
        groups.set_counter("seen", 0)
        total = groups.extra_weight + (weight - 1.0) + seen if weighs else groups.extra_weight + seen
        means: dict[int, torch.Tensor] = {}
        for group in fresh:
            means.update(zip(map(id, group.parameters), _means(group, weight, total, begins=begins), strict=True))
        for group in groups.groups_with_state():
            pairs = zip(group.parameters, group.sum, strict=True)
            group.replace_grads([means[id(p)] if id(p) in means else s / total.to(s.device) for p, s in pairs])


def _means(group: Group, weight: float | torch.Tensor, total: torch.Tensor, *, begins: bool) -> list[torch.Tensor]:
    """Return (sum + weight gradient) / total, in the memory of the gradients where each has its own."""
    sums, grads = group.sum, group.grads
    total = total.to(sums[0].device)
    # a gradient with a graph is not to be taken for the mean
    if any(g.requires_grad for g in grads) or _share_memory(grads):
        sums = group.copies(sums)
        _add(group, sums, grads, weight, begins=begins)
        torch._foreach_div_(sums, total)
        return sums
    if begins and _is_one(weight):
        return grads  # the only ones of this window
    if _is_one(weight) and all(g.dtype == s.dtype for g, s in zip(grads, sums, strict=True)):
        torch._foreach_add_(grads, sums)
        torch._foreach_div_(grads, total)
        return grads
    for block in group.blocks():
        # the sums of 16-bit gradients are wider
        means = block.copies(block.sum)
        _add(block, means, block.grads, weight, begins=begins)
        torch._foreach_div_(means, total)
        torch._foreach_copy_(block.grads, means)
    return grads


def _share_memory(tensors: list[torch.Tensor]) -> bool:
    return len({t.data_ptr() for t in tensors}) < len(tensors)


def _add(
    group: Group,
    sums: list[torch.Tensor],
    gradients: list[torch.Tensor],
    weight: float | torch.Tensor,
    *,
    begins: bool,
) -> None:
    """Set sum <- sum + weight gradient; the first one of a window takes the place of what the sum held."""
    if begins and _is_one(weight):
        torch._foreach_copy_(sums, gradients)
        return
    if begins:
        torch._foreach_zero_(sums)
    if isinstance(weight, torch.Tensor):
        weight = weight.to(sums[0].device)
        for total, gradient in zip(sums, gradients, strict=True):
            total.addcmul_(gradient.to(total.dtype), weight.to(total.dtype))
    else:
        group.add(sums, gradients, alpha=weight)


def _is_one(weight: float | torch.Tensor) -> bool:
    return not isinstance(weight, torch.Tensor) and weight == 1.0


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"accumulate": Accumulate}
