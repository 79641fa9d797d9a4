"""Every optimizer of `torch.optim`, unchanged, under its lower-case name."""

import re

import torch

from metaopt import hookimpl


def _name(class_name: str) -> str:
    """Return the registered name of a class: SparseAdam -> sparse_adam, AdamW -> adamw, LBFGS -> lbfgs."""
    return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", class_name).lower()


@hookimpl
def metaopt_optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    # walked, not listed: what a newer torch adds is there at once
    found = (value for value in vars(torch.optim).values() if isinstance(value, type))
    classes = {c for c in found if issubclass(c, torch.optim.Optimizer) and c is not torch.optim.Optimizer}
    return {_name(c.__name__): c for c in sorted(classes, key=lambda c: c.__name__)}
