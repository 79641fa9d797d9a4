"""Different optimizers for different parameters, in one stack."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch

from metaopt import Example, ParameterError, Partitioner, hookimpl

DIMENSIONS = {"scalar": lambda d: d == 0, "vector": lambda d: d == 1, "matrix": lambda d: d == 2}


class Partition(Partitioner):
    """Each parameter goes to the pipeline of the first pattern that matches it: partition({"pattern": pipeline, ...}).

    A pattern is a shell glob on the parameter's name, one of the words scalar, vector and matrix (0, 1 and 2
    dimensions), or several of these joined by `&`: `{"blocks.*.weight & matrix": muon(lr=0.02), "*": adamw(lr=3e-4)}`.
    """

    known_as = ("multi_transform", "CombinedOptimizer", "MultiOptimizer", "ChainedOptimizer")

    def __init__(self, parts: Mapping[str, Any]) -> None:
        super().__init__(parts)
        self._terms = {pattern: [term.strip() for term in pattern.split("&")] for pattern in self.parts}
        for pattern, terms in self._terms.items():
            if not all(terms):
                raise ParameterError(f"partition: the pattern {pattern!r} has nothing on one side of a '&'")

    def branch_of(self, name: str, parameter: torch.Tensor) -> str | None:
        return next((p for p, terms in self._terms.items() if all(_fits(t, name, parameter) for t in terms)), None)


def _fits(term: str, name: str, parameter: torch.Tensor) -> bool:
    dimensions = DIMENSIONS.get(term)
    return fnmatchcase(name, term) if dimensions is None else dimensions(parameter.dim())


@hookimpl
def metaopt_optimizers() -> dict[str, type[Partitioner]]:
    return {"partition": Partition}


@hookimpl
def metaopt_examples() -> dict[str, Example]:
    return {"partition": Example("partition({'*.weight & matrix': sgd(lr=0.1, momentum=0.9), '*': adamw(lr=0.01)})")}
