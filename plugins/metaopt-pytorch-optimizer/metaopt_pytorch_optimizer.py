"""The optimizers of the package pytorch-optimizer, unchanged, under `pytorch_optimizer.<name>`."""

import inspect

import pytorch_optimizer
import torch

from metaopt import hookimpl


@hookimpl
def metaopt_optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    classes = {name.lower(): getattr(pytorch_optimizer, name) for name in dir(pytorch_optimizer)}
    supported = sorted(set(pytorch_optimizer.get_supported_optimizers()) & set(classes))
    return {f"pytorch_optimizer.{name}": classes[name] for name in supported if _is_base_of_its_own(classes[name])}


def _is_base_of_its_own(optimizer: type[torch.optim.Optimizer]) -> bool:
    """Tell whether a stack can build this class and metaopt does not have it already.

    That package also lists torch's own classes, and some that take a whole model or another optimizer.
    """
    first = next(iter(inspect.signature(optimizer).parameters))
    return first == "params" and not optimizer.__module__.startswith("torch.")
