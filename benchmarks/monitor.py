"""`python -m benchmarks.monitor`: what `monitor` adds to a training step of the transformer, in processor time.

A step is the forward and backward pass over one batch and the update; the logger forgets its points. Stacks with and
without the part take turns, and each difference is of two updates that follow each other.
"""

import statistics
import time
from collections.abc import Mapping, Sequence

import torch

import metaopt
from benchmarks.training_step import text_model, text_problem
from metaopt import Logger

BASE = "clip_grad_norm(1.0) | adamw(lr=3e-4)"
# groups of measurements, and the largest share of a step that the default may add: where logged, and every 50 updates
SPECS = {
    "monitor": "monitor",
    "+ effective_lr, sign_agreement": "monitor(effective_lr=True, sign_agreement=True)",
    "+ alignment": "monitor(alignment=True)",
    "+ moments": "monitor(moments=True)",
    "+ histograms": "monitor(histograms=True)",
}


class Kept(Logger):
    """Takes points and forgets them."""

    def open(
        self, *, step: int, tags: Sequence[str], spec: str, hparams: Mapping[str, bool | int | float | str]
    ) -> None:
        """Begin the run."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take a point."""


def seconds_added(spec: str, every: int, rounds: int) -> tuple[float, float]:
    """Return the median seconds that a part adds to an update, and those of the update without it."""
    problem = text_problem()
    stacks = []
    for text in (BASE, f"{BASE} | {spec}"):
        model = text_model()
        opt = metaopt.build(model.parameters(), text, log=Kept(), log_every=every)
        problem.loss(model, next(problem.batches(0))).backward()  # type: ignore[no-untyped-call]
        for _ in range(3):
            opt.step()
        stacks.append(opt)
    spent: list[list[float]] = [[], []]
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            began = time.thread_time()
            stacks[which].step()
            spent[which].append(time.thread_time() - began)
    added = statistics.median(b - a for a, b in zip(*spent, strict=True))
    return added, statistics.median(spent[0])


def pass_seconds(repeats: int = 5) -> float:
    """Return the median seconds of a forward and backward pass."""
    problem, model = text_problem(), text_model()
    batches, spent = problem.batches(0), []
    for _ in range(1 + repeats):
        batch = next(batches)
        began = time.thread_time()
        problem.loss(model, batch).backward()  # type: ignore[no-untyped-call]
        spent.append(time.thread_time() - began)
    return statistics.median(spent[1:])


def main(rounds: int = 21) -> None:
    """Print a line for each group of measurements."""
    torch.set_num_threads(1)
    whole = pass_seconds()
    print(f"forward and backward: {whole * 1e3:.1f} ms of processor time")
    for name, spec in SPECS.items():
        measured, update = seconds_added(spec, 1, rounds)
        idle, _ = seconds_added(spec, 10**9, rounds)
        step = whole + update
        print(
            f"{name:34} measured: {measured * 1e3:7.2f} ms, {measured / step:6.2%} of a step; "
            f"not measured: {idle * 1e6:6.1f} us; every 50 updates: {(measured + 49 * idle) / 50 / step:6.3%}"
        )


if __name__ == "__main__":
    main()
