"""Noise on the gradients that dies away."""

from metaopt import Groups, Wrapper, hookimpl, hyper


class GradientNoise(Wrapper):
    """g <- g + N(0, eta / (1 + t)^gamma), t being the number of updates made so far. arXiv:1511.06807

    The noise depends on seed, label, update and parameter only: a resumed run repeats it. Write it behind `accumulate`:
    before it, all gradients of a window would get the same noise.
    """

    known_as = ("add_noise", "gradient noise", "annealed Gaussian noise")

    eta: float = hyper(0.01, ge=0.0, doc="the variance of the first noise; the paper tries 0.01, 0.3 and 1")
    gamma: float = hyper(0.55, ge=0.0, doc="how fast the variance falls")
    seed: int = hyper(0, ge=0, doc="the seed of the noise", per_group=False)

    def on_gradients(self, groups: Groups) -> None:
        for group in groups:
            deviation = (group.eta / (1 + group.updates) ** group.gamma) ** 0.5
            # one at a time: all the noise at once would take as much memory as the weights
            for gradient in group.grads:
                gradient.add_(group.random_like(gradient), alpha=deviation)


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"gradient_noise": GradientNoise}
