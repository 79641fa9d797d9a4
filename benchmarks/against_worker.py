"""The process that `benchmarks.against` starts for each checkout: it builds stacks and times their updates on request.

Requests and answers are lines of JSON. It uses only `metaopt.build` and `step()`, which every version has.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import metaopt

GRADIENT_NORM, WEIGHT_SCALE = 10.0, 0.02


class Work:
    """One stack over parameters of given names and shapes, with gradients that are put back before each update."""

    def __init__(self, spec: str, shapes: list[tuple[str, list[int]]]) -> None:
        generator = torch.Generator().manual_seed(0)
        scale = GRADIENT_NORM / sum(torch.Size(shape).numel() for _, shape in shapes) ** 0.5
        weights = [torch.randn(shape, generator=generator) * WEIGHT_SCALE for _, shape in shapes]
        self.parameters = [torch.nn.Parameter(weight) for weight in weights]
        self.gradients = [torch.randn(shape, generator=generator) * scale for _, shape in shapes]
        self.handed_out = [torch.empty_like(gradient) for gradient in self.gradients]
        names = [name for name, _ in shapes]
        self.optimizer: Any = metaopt.build(list(zip(names, self.parameters, strict=True)), spec)

    def run(self, updates: int) -> float:
        """Return the mean seconds of so many updates."""
        seconds = 0.0
        for _ in range(updates):
            for p, gradient in zip(self.parameters, self.handed_out, strict=True):
                p.grad = gradient
            torch._foreach_copy_(self.handed_out, self.gradients)
            began = time.perf_counter()
            self.optimizer.step()
            seconds += time.perf_counter() - began
        return seconds / updates


def main() -> None:
    """Answer requests until the input ends: {"spec", "shapes"} builds, {"updates"} runs."""
    torch.set_num_threads(1)
    assert metaopt.__file__ is not None
    print(json.dumps({"package": str(Path(metaopt.__file__).parent)}), flush=True)
    work: Work | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "spec" in request:
                work = None  # frees the memory of the last one first
                work = Work(request["spec"], request["shapes"])
                answer: dict[str, Any] = {}
            else:
                assert work is not None
                answer = {"seconds": work.run(request["updates"])}
        except metaopt.MetaoptError as error:  # one version may refuse what the other accepts
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
