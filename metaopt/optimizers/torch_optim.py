"""Every optimizer of `torch.optim`, unchanged, under its lower-case name."""

import re
from dataclasses import replace

import torch

from metaopt import Example, hookimpl

# as torch computes them; g is the gradient, w the parameter, t the number of the update
ADAM = (
    "m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; w <- w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps). "
    "arXiv:1412.6980"
)
RULES = {
    "adadelta": (
        "v <- rho v + (1 - rho) g^2; u = g sqrt(d + eps) / sqrt(v + eps); d <- rho d + (1 - rho) u^2; w <- w - lr u. "
        "arXiv:1212.5701"
    ),
    "adafactor": (
        "R, C <- averages of the means of g^2 over rows and columns; u = g / sqrt(R C / mean(R)); "
        "w <- w - max(eps2, rms(w)) min(lr, 1 / sqrt(t)) u / max(1, rms(u) / d). arXiv:1804.04235"
    ),
    "adagrad": "s <- s + g^2; w <- w - lr / (1 + (t - 1) lr_decay) g / (sqrt(s) + eps). jmlr.org/papers/v12/duchi11a",
    "adam": ADAM,
    "adamax": "m <- b1 m + (1 - b1) g; u <- max(b2 u, |g| + eps); w <- w - lr / (1 - b1^t) m / u. arXiv:1412.6980",
    "adamw": f"w <- w - lr weight_decay w (arXiv:1711.05101), then Adam's: {ADAM}",
    "asgd": (
        "w <- (1 - lambd eta) w - eta g with eta = lr / (1 + lambd lr t)^alpha; ax <- the mean of w from t0 on. "
        "doi:10.1137/0330046"
    ),
    "lbfgs": (
        "w <- w - lr H g, up to max_iter times, H the inverse Hessian as the last history_size changes of w and g give "
        "it. doi:10.1007/BF01589116"
    ),
    "muon": (
        "b <- momentum b + (1 - momentum) g; w <- (1 - lr weight_decay) w - lr s O(momentum b + (1 - momentum) g), "
        "O the nearest orthogonal matrix by Newton and Schulz, s by the shape. kellerjordan.github.io/posts/muon, "
        "arXiv:2502.16982"
    ),
    "nadam": "Adam's, with the momentum of the next update in place of m, as Nesterov's: Dozat 2016. arXiv:1412.6980",
    "radam": (
        "w <- w - lr m / (1 - b1^t) while too few gradients were seen for a second moment, then Adam's times r(t), "
        "which rises to 1. arXiv:1908.03265"
    ),
    "rmsprop": (
        "v <- alpha v + (1 - alpha) g^2; b <- momentum b + g / (sqrt(v) + eps); w <- w - lr b. arXiv:1308.0850"
    ),
    "rprop": (
        "eta <- eta etaplus where g keeps its sign, eta etaminus where it turns and g <- 0 there; "
        "w <- w - eta sign(g), for each component. doi:10.1109/ICNN.1993.298623"
    ),
    "sgd": (
        "b <- momentum b + (1 - dampening) g, b = g at first; w <- w - lr b, "
        "with nesterov w <- w - lr (g + momentum b). doi:10.1016/0041-5553(64)90137-5"
    ),
    "sparse_adam": f"Adam's, of the entries alone that the sparse gradient holds: {ADAM}",
}
NESTEROV = (
    "nesterov=True is exact Nesterov momentum, v <- m v + gradient(theta - lr m v); theta <- theta - lr v, seen in the "
    "shifted variable y = theta - lr m v: the weights are y, the anticipated positions, at which the gradient is taken."
)
COUPLED = (
    "weight_decay is added to the gradient and divided by its size with it; adamw's acts apart from the gradient "
    "(arXiv:1711.05101), and so does decoupled_weight_decay=True."
)


def _name(class_name: str) -> str:
    """Return the registered name of a class: SparseAdam -> sparse_adam, AdamW -> adamw, LBFGS -> lbfgs."""
    return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", class_name).lower()


@hookimpl
def metaopt_optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    # walked, not listed: what a newer torch adds is there at once
    found = (value for value in vars(torch.optim).values() if isinstance(value, type))
    classes = {c for c in found if issubclass(c, torch.optim.Optimizer) and c is not torch.optim.Optimizer}
    return {_name(c.__name__): c for c in sorted(classes, key=lambda c: c.__name__)}


@hookimpl
def metaopt_examples() -> dict[str, Example | list[Example]]:
    reads = "torch reads {} in Python at every update"
    examples: dict[str, Example | list[Example]] = {
        "adafactor": Example(expected_failures={"waits_for_no_device": reads.format("the norm of each parameter")}),
        "asgd": Example(
            expected_failures={"waits_for_no_device": reads.format("its step and rate, kept on the device,")}
        ),
        "lbfgs": Example(
            "lbfgs(lr=0.1, max_iter=3)",
            expected_failures={
                "state_is_whole_at_the_first_step": "torch leaves early, without a history, where the gradient is zero",
                "template_step_leaves_the_run_alone": "torch keeps the state of all parameters under the first one",
                "waits_for_no_device": reads.format("the loss and the direction"),
            },
        ),
        # some parameters begin late, and some gradients are sparse: the fused kernel can do neither
        "sgd": [
            Example("sgd(lr=0.1, momentum=0.9)", note=NESTEROV, known_as=("MomentumSGD", "momentum", "nesterov")),
            Example("sgd(lr=0.1)", gradients="sparse"),
        ],
        "adam": Example(note=COUPLED),
        "muon": Example("muon(lr=0.01)", parameters="matrices"),
        "sparse_adam": Example(
            gradients="sparse",
            expected_failures={
                "template_step_leaves_the_run_alone": "that step has dense gradients, which it refuses",
                "waits_for_no_device": "summing up duplicate indices has to count them",
            },
        ),
    }
    return {name: _with_rule(name, examples.get(name, Example())) for name in metaopt_optimizers()}


def _with_rule(name: str, given: Example | list[Example]) -> Example | list[Example]:
    first, *others = given if isinstance(given, list) else [given]
    note = "\n\n".join(text for text in (RULES.get(name, ""), first.note) if text)
    return [replace(first, note=note), *others]
