"""Some allowed value for every hyperparameter that has no default: enough to make a part without an example."""

from dataclasses import replace as changed
from typing import Any

from metaopt.errors import HyperparameterError
from metaopt.hyperparameters import Hyperparameter
from metaopt.specs.pipeline import part


def allowed(hyperparameter: Hyperparameter) -> Any:
    """Return some value that a required hyperparameter allows. Raises HyperparameterError where none is known."""
    candidates: list[Any] = [*(hyperparameter.choices or ()), 1.0, 0.5, 0.1, 2, 3, 1, 10, True, "text", (1, 2)]
    if hyperparameter.type == int | float:  # a length: a number of updates, or a part of the run
        candidates.insert(0, 10)
    for value in candidates:
        try:
            return hyperparameter.validate(value, where=hyperparameter.name)
        except HyperparameterError:
            continue
    raise HyperparameterError(f"{hyperparameter.name} has no default: give a metaopt.Example(spec=...) with a value")


def spec_with_allowed(name: str, kind: str) -> str:
    """Return a part as text, with some allowed value for every hyperparameter that has no default."""
    found = part(name, kind)
    required = {n: allowed(h) for n, h in found.hyperparameters.items() if h.required}
    text = str(changed(found, arguments=required))
    return text if required or kind not in ("schedule", "space", "tuner") else f"{text}()"
