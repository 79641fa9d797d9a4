"""`python -m benchmarks.paths`: the ratios of an update that the performance page shows.

Pairs are interleaved in one process; one thread is timed by its own clock, which other programs move the least, several
by the time that passes. Run it with and without `METAOPT_KERNELS=0` to compare the library with torch's kernels.
"""

import argparse
import datetime
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

import metaopt
from benchmarks.clock import sample
from benchmarks.machine import machine, machine_line
from metaopt.lab.shapes import make_tensor_set
from metaopt.lab.timing import Spread, ratios
from metaopt.programs import kernels

ROUNDS = 20
# updates of a sample: enough of them to be timed, a multiple of Lookahead's period
UPDATES = {"tiny": 100, "many": 10, "transformer": 5, "large": 5}
FULL = "clip_grad_norm(1.0) | adamw | lookahead(k=5)"

CPU = torch.device("cpu")

Step = Callable[[], Any]


def fused(params: list[torch.nn.Parameter]) -> Step:
    """Return the step of torch's fused AdamW."""
    return torch.optim.AdamW(params, fused=True).step


def by_hand(params: list[torch.nn.Parameter], step: Step | None = None) -> Step:
    """Return what people write: a clip by the norm, then `step`; by default fused AdamW, without a Lookahead."""
    step = step or fused(params)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        step()

    return update


def by_package(params: list[torch.nn.Parameter]) -> Step:
    """Return what the package pytorch-optimizer is for: a clip, then default AdamW in its Lookahead."""
    from pytorch_optimizer import Lookahead

    return by_hand(params, Lookahead(torch.optim.AdamW(params), k=5).step)


def stack(spec: str) -> Callable[[list[torch.nn.Parameter]], Step]:
    """Return what makes a stack's step."""
    return lambda params: metaopt.build(params, spec).step


PAIRS = {
    f"`{FULL}` to `clip_grad_norm_`, fused AdamW": (stack(FULL), by_hand),
    "`adamw | lookahead(k=5)` to fused AdamW": (stack("adamw | lookahead(k=5)"), fused),
    "`adamw` to fused AdamW": (stack("adamw"), fused),
    f"`{FULL}` to `clip_grad_norm_`, default AdamW, Lookahead of pytorch-optimizer": (stack(FULL), by_package),
}


class Contender:
    """An update of parameters of its own; the gradients are put back before each, because a clip scales them."""

    def __init__(self, name: str, make: Callable[[list[torch.nn.Parameter]], Step]) -> None:
        tensors = make_tensor_set(name)
        self.gradients = tensors.gradients
        params = [torch.nn.Parameter(weight) for weight in tensors.weights]
        for p, gradient in zip(params, self.gradients, strict=True):
            p.grad = gradient.clone()
        self.held = [p.grad for p in params if p.grad is not None]
        self.step = make(params)

    def seconds(self, updates: int) -> float:
        """Return the mean time of an update."""
        return sample(CPU, lambda: torch._foreach_copy_(self.held, self.gradients), self.step, updates).host


def measured(name: str, makers: tuple[Callable[..., Step], Callable[..., Step]]) -> tuple[Spread, float]:
    """Return the ratio of the rounds, and the seconds of an update of the first."""
    contenders = [Contender(name, make) for make in makers]
    rounds = [[contender.seconds(UPDATES[name]) for contender in contenders] for _ in range(ROUNDS + 1)]
    rounds = rounds[1:]  # the first makes the state
    own, other = zip(*rounds, strict=True)
    return ratios(own, other), median(own)


def main() -> None:
    """Print a table as Markdown."""
    parser = argparse.ArgumentParser(description="What an update costs beside torch's and pytorch-optimizer's.")
    parser.add_argument("shapes", nargs="*", help=f"of {', '.join(UPDATES)} (default: all)")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    names = arguments.shapes or list(UPDATES)
    torch.set_num_threads(arguments.threads)
    library = kernels()
    print(f"{machine_line(machine('cpu'))}, {datetime.date.today().isoformat()}, ", end="")
    print(f"threads: {arguments.threads}, ", end="")
    print("without metaopt-kernels" if library is None else f"metaopt-kernels ({library.variant})")
    print(f"\n| ratio, median [quartiles] of {ROUNDS} rounds | {' | '.join(names)} |\n|{' --- |' * (len(names) + 1)}")
    for what, makers in PAIRS.items():
        cells = []
        for name in names:
            ratio, seconds = measured(name, makers)
            cells.append(f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}], {seconds * 1e3:.3g} ms")
        print(f"| {what.replace('|', chr(92) + '|')} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
