"""What another batch size asks of a learning rate."""

import math
from typing import Any, Literal

from metaopt.errors import HyperparameterError, did_you_mean

RULES = {"linear": lambda factor: factor, "sqrt": math.sqrt}


def scale_lr(lr: float, from_batch: int, to_batch: int, rule: Literal["linear", "sqrt"] = "linear") -> float:
    """Return the learning rate for another batch size: lr * f, or lr * sqrt(f), with f = to_batch / from_batch.

    "linear" is for SGD, with a warm-up where f is large (arXiv:1706.02677). "sqrt" is for Adam and its kin, whose
    rule (arXiv:2205.10287) also asks for 1 - beta times f, for each of the two, and eps / sqrt(f). Batch sizes are
    examples per update, over all devices and accumulated batches. Raises HyperparameterError.
    """
    if rule not in RULES:
        raise HyperparameterError(
            f"scale_lr: rule must be one of {', '.join(map(repr, RULES))}, got {rule!r}."
            f"{did_you_mean(str(rule), RULES)}"
        )
    rate = _positive("lr", lr, "the number inside a schedule, such as cosine(scale_lr(...))")
    before = _positive("from_batch", from_batch, "examples per update")
    after = _positive("to_batch", to_batch, "examples per update")
    return float(rate * RULES[rule](after / before))


def _positive(name: str, value: Any, meaning: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise HyperparameterError(f"scale_lr: {name} must be a number > 0 ({meaning}), got {value!r}")
    return float(value)
