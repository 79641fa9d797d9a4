"""ZClip: clipping of gradients that are unusually large for this run."""

from typing import Literal

import torch

from metaopt import Example, Groups, Wrapper, counter, history, hookimpl, hyper, scalar


class Zclip(Wrapper):
    """g <- g bound / |g| if z = (|g| - mean) / deviation > z_thresh, |g| over all parameters. arXiv:2504.02507

    bound = mean + z_thresh^2 / z deviation; with mode="mean" it is the mean, with "max" mean + z_thresh deviation. Mean
    and variance are averages over the norms so far, as clipped: mean <- alpha mean + (1 - alpha) min(|g|, bound). They
    begin as those of the first `warmup` norms, which are not clipped; write `clip_grad_norm` behind it to bound these.
    """

    known_as = ("ZClip", "z-score clipping")
    clips_gradients = True
    measures = {"clipped_fraction": "the share of updates that were clipped"}

    alpha: float = hyper(0.97, ge=0.0, lt=1.0, doc="how much of mean and variance a step keeps", per_group=False)
    z_thresh: float = hyper(2.5, gt=0.0, doc="from how many deviations on a norm is a spike", per_group=False)
    warmup: int = hyper(
        25, ge=1, doc="how many norms mean and variance begin with", known_as=("warmup_steps",), defines_state=True
    )
    mode: Literal["reciprocal", "mean", "max"] = hyper(
        "reciprocal",
        choices=("reciprocal", "mean", "max"),
        doc="what a spike is clipped to; reciprocal: the larger it is, the nearer to the mean",
        known_as=("clip_option",),
        per_group=False,
    )
    first = history("warmup", per="run")
    mean = scalar(0.0, per="run")
    variance = scalar(0.0, per="run")
    seen = counter("how many norms of the first ones were seen")

    def on_gradients(self, groups: Groups) -> None:
        norm, mean, variance = groups.norm().to(groups.mean), groups.mean, groups.variance
        seen = groups.seen + 1
        if seen <= groups.warmup:
            groups.set_counter("seen", seen)
            groups.push("first", norm)
            if seen == groups.warmup:
                mean.copy_(groups.first.mean())
                variance.copy_(groups.first.var(correction=0))
            return
        bound = _bound(groups, norm)
        groups.scale(torch.where(bound < norm, bound / (norm + 1e-6), 1.0))
        mean.lerp_(bound, 1.0 - groups.alpha)
        variance.lerp_((bound - mean).square(), 1.0 - groups.alpha)
        if groups.has_logger or groups.is_logged:
            groups.measure("clipped_fraction", bound < norm)


def _bound(groups: Groups, norm: torch.Tensor) -> torch.Tensor:
    """Return the largest norm that passes: this one itself if it is not a spike."""
    deviation = groups.variance.sqrt()
    z = (norm - groups.mean) / (deviation + 1e-6)
    reach = {"reciprocal": groups.z_thresh**2 / z, "mean": 0.0, "max": groups.z_thresh}[groups.mode]
    return torch.where(z > groups.z_thresh, groups.mean + reach * deviation, norm)


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"zclip": Zclip}


@hookimpl
def metaopt_examples() -> dict[str, list[Example]]:
    return {"zclip": [Example("zclip(z_thresh=0.5, warmup=2)"), Example("zclip(warmup=2, mode='mean')")]}
