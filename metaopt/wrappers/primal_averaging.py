"""Gradients taken between an average of the weights and the point that the base steps from."""

import torch

from metaopt import Example, Group, Wrapper, anchor, hookimpl, hyper, scalar


class Gpa(Wrapper, elementwise=True):
    """z <- z + u; x <- mu_x x + (1 - mu_x) z; y <- mu_y x + (1 - mu_y) z, u being the base's step. arXiv:2512.17131

    The weights are y, where gradients are taken and a decay of the base acts. `opt.averaged()` shows x, the weights to
    evaluate. Only z is kept: x is worked out from y and z, so a change of mu_y in the middle of a run moves x. Give a
    decay to the base, or write it as a part on the update: `decay` before the base changes y and not z.
    mu_x = 0.9^(1/s) averages about as far back as single-worker DiLoCo with s inner steps: 0.9967 for 32.
    """

    known_as = ("GPA", "GPAAdamW", "generalized primal averaging", "primal averaging")

    mu_x: float = hyper(0.9967, ge=0.0, lt=1.0, doc="how much of x an update keeps", known_as=("eval_interp_coeff",))
    mu_y: float = hyper(0.7, gt=0.0, le=1.0, doc="the share of x in y, the rest is z", known_as=("train_interp_coeff",))
    # a step is too small beside weights of 16 bits to be added to them again and again
    z = anchor(dtype="at least float32")

    def on_update(self, group: Group) -> None:
        _step(group, group.mu_y, 1.0 - group.mu_x)

    def averaged(self, group: Group) -> list[torch.Tensor]:
        return _average(group, group.mu_y)


class ScheduleFree(Wrapper, elementwise=True):
    """z <- z + u; x <- (1 - c) x + c z; y <- momentum x + (1 - momentum) z. arXiv:2405.15682

    c is this update's share of the sum of t^r lr_max^weight_lr_power over all updates so far, lr_max the largest rate
    so far. The weights are y, where gradients are taken; `opt.averaged()` shows x, the weights to evaluate, which is
    worked out from y and z: leave momentum as it is during a run. The base needs no momentum of its own:
    `adamw(betas=(0.0, 0.999), weight_decay=0.1) | schedule_free(0.9)` is AdamWScheduleFree, whose decay acts at y too.
    `decay` before the base would change y and not z: take weight_decay_at_y.
    """

    known_as = ("ScheduleFree", "ScheduleFreeWrapper", "AdamWScheduleFree", "SGDScheduleFree", "schedule-free")

    momentum: float = hyper(0.9, gt=0.0, le=1.0, doc="the share of x in y, the rest is z", known_as=("beta1",))
    r: float = hyper(0.0, ge=0.0, doc="the power of the update's number in its weight")
    weight_lr_power: float = hyper(2.0, ge=0.0, doc="the power of the largest rate so far in an update's weight")
    weight_decay_at_y: float = hyper(0.0, ge=0.0, doc="z <- z - lr weight_decay_at_y y, for a base without decay")
    # a step is too small beside weights of 16 bits to be added to them again and again
    z = anchor(dtype="at least float32")
    lr_max = scalar(0.0)
    weight_sum = scalar(0.0)
    summed = scalar(0.0, doc="the last update whose weight is in the sum")

    def on_update(self, group: Group) -> None:
        number = group.updates + 1
        group.lr_max.clamp_(min=group.base_lr)
        weight = group.lr_max**group.weight_lr_power * float(number) ** group.r
        # a group may come in several lists, and its weight counts once
        group.weight_sum.add_(weight * (group.summed < number))
        group.summed.fill_(number)
        if group.weight_decay_at_y:
            decayed = torch._foreach_mul(group.params, group.base_lr * group.weight_decay_at_y)
            group.add(group.update, list(decayed), alpha=-1.0)
        # a warm-up that begins at zero has a first weight of 0
        _step(group, group.momentum, weight / group.weight_sum.clamp(min=torch.finfo(weight.dtype).tiny))

    def averaged(self, group: Group) -> list[torch.Tensor]:
        return _average(group, group.momentum)


def _step(group: Group, mu: float, c: float | torch.Tensor) -> None:
    """Advance z by the base's step and set the step to y' - y = c (z' - y) + (1 - mu) (1 - c) u."""
    torch._foreach_add_(group.z, group.update)
    torch._foreach_mul_(group.update, (1.0 - mu) * (1.0 - c))
    ahead = torch._foreach_sub(group.z, group.cast(group.params))
    torch._foreach_mul_(ahead, c)
    torch._foreach_add_(group.update, ahead)


def _average(group: Group, mu: float) -> list[torch.Tensor]:
    """Return x = y + (1 - 1 / mu) (z - y)."""
    average = torch._foreach_sub(group.z, group.params)
    torch._foreach_mul_(average, 1.0 - 1.0 / mu)
    torch._foreach_add_(average, group.params)
    return list(average)


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"gpa": Gpa, "schedule_free": ScheduleFree}


@hookimpl
def metaopt_examples() -> dict[str, list[Example]]:
    return {
        "gpa": [Example("gpa"), Example("gpa(mu_x=0.9)")],
        "schedule_free": [Example("schedule_free"), Example("schedule_free(r=1.0, weight_decay_at_y=0.1)")],
    }
