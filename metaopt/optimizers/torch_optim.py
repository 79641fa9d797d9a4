"""Every optimizer of `torch.optim`, unchanged, under its lower-case name."""

import re

import torch

from metaopt import Example, hookimpl

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
        "adafactor": Example(excuses={"waits_for_no_device": reads.format("the norm of each parameter")}),
        "asgd": Example(excuses={"waits_for_no_device": reads.format("its step and rate, kept on the device,")}),
        "lbfgs": Example(
            "lbfgs(lr=0.1, max_iter=3)",
            excuses={
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
            excuses={
                "template_step_leaves_the_run_alone": "that step has dense gradients, which it refuses",
                "waits_for_no_device": "summing up duplicate indices has to count them",
            },
        ),
    }
    return {name: example for name, example in examples.items() if name in metaopt_optimizers()}
