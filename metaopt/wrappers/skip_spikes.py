"""No update from gradients that are unusually large for this run."""

import torch

from metaopt import Example, Groups, Wrapper, counter, history, hookimpl, hyper


class SkipSpikes(Wrapper):
    """The update is skipped if |g| > bound = mean + sigma deviation, |g| over all parameters: a spike.

    The rule is that of OLMo-core's SkipStepOptimizer (https://github.com/allenai/OLMo-core), for gradients. Mean and
    deviation are those of the last `window` norms, as soon as half of them are known; the deviation counts as a
    thousandth of the mean at least. A spike is remembered as its bound, so that a lasting change is soon no spike any
    more. `zclip` makes a smaller update instead. What is not finite passes and is not remembered: write
    `skip_nonfinite` as well. It waits for the norm once per update, and takes the gradients of a skipped update away.
    """

    known_as = ("SkipStepOptimizer", "skip_bad_steps", "spike detection", "loss spikes", "outlier")
    may_skip_updates = True
    syncs_device = True
    measures = {"spikes": "how many updates were skipped so far"}

    sigma: float = hyper(
        6.0,
        gt=0.0,
        doc="how many deviations above the mean a spike begins",
        known_as=("sigma_factor",),
        per_group=False,
    )
    window: int = hyper(
        128, ge=2, doc="how many norms are remembered", known_as=("rolling_interval_length",), defines_state=True
    )
    norms_seen = history("window", per="run")
    spikes = counter("how many updates were skipped so far")

    def on_gradients(self, groups: Groups) -> None:
        norm = groups.norm().to(groups.norms_seen)
        bound = _bound(groups.norms_seen, groups.sigma)
        finite, is_spike = torch.stack([norm.isfinite(), norm > bound]).tolist()
        if not finite:
            return
        groups.push("norms_seen", bound if is_spike else norm)
        if is_spike:
            groups.set_counter("spikes", groups.spikes + 1)
            for group in groups:
                group.clear_grads()
            groups.skip_update("a spike of the gradient norm")
        elif groups.is_logged:
            groups.measure("spikes", groups.spikes)


def _bound(seen: torch.Tensor, sigma: float) -> torch.Tensor:
    """Return the largest norm that is no spike; infinity until enough norms are known."""
    known = ~seen.isnan()
    number = known.sum()
    mean = seen.nan_to_num().sum() / number
    deviation = ((seen - mean).nan_to_num().square().sum() / number).sqrt()
    bound = mean + sigma * torch.maximum(deviation, mean / 1000)
    return torch.where(2 * number >= seen.numel(), bound, torch.inf)


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"skip_spikes": SkipSpikes}


@hookimpl
def metaopt_examples() -> dict[str, Example]:
    return {"skip_spikes": Example("skip_spikes(window=6)")}
