"""Clipping every component of every gradient."""

import torch

from metaopt import Groups, Wrapper, hookimpl, hyper


class ClipGradValue(Wrapper):
    """g <- min(max(g, -clip_value), clip_value), componentwise."""

    known_as = ("clip_by_value", "gradient_clip_algorithm", "clip_grad_value_")
    clips_gradients = True
    supports_sparse_grads = True

    clip_value: float = hyper(gt=0.0, doc="the largest magnitude of a component", known_as=("max_delta", "value"))

    def on_gradients(self, groups: Groups) -> None:
        for group in groups:
            # a complex number has two components
            components = [torch.view_as_real(g) if g.is_complex() else g for g in group.grads]
            if components[0].is_cpu:  # one pass over memory, not two
                for component in components:
                    component.clamp_(-group.clip_value, group.clip_value)
            else:
                torch._foreach_clamp_min_(components, -group.clip_value)
                torch._foreach_clamp_max_(components, group.clip_value)


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"clip_grad_value": ClipGradValue}
