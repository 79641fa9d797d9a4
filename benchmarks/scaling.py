"""`python -m benchmarks.scaling`: how an update grows with tensors, wrappers and groups, beside the project's aims.

Prints a table as Markdown, by one thread: what is timed together is interleaved in one process, by the thread's own
clock. Run it with and without `METAOPT_KERNELS=0`: most aims are others with the library. It takes some minutes.
"""

import ctypes
import datetime
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

import metaopt
from benchmarks.bandwidth import Probe
from benchmarks.clock import sample
from benchmarks.machine import machine, machine_line
from benchmarks.measure import least_bytes
from benchmarks.paths import CPU, FULL, by_hand
from metaopt import Group, Wrapper, adamw, anchor, elementwise
from metaopt.engine.views.blocks import CPU_BLOCK
from metaopt.lab.shapes import make_tensor_set
from metaopt.lab.timing import ratios, steps_of_update
from metaopt.programs import kernels

ROUNDS = 20
# by number of tensors: updates of a sample, a multiple of Lookahead's period
UPDATES = {10: 200, 100: 50, 1_000: 10, 10_000: 5}
SAVED, BUILT, GROUPS = 1_000, 10_000, 100
EIGHT = (
    "clip_grad_value(1.0) | l2(0.01) | grokfast | decay(0.01) | adamw | ema | lookahead(k=5) | "
    "ema(0.99, label='second') | outer(k=5)"
)
ONE = (
    *("clip_grad_value(0.1) | adamw", "accumulate(2) | adamw", "decay(0.01) | adamw", "l2(0.01) | adamw"),
    *("adamw | ema", "adamw | lookahead(k=5)"),
)

Call = Callable[[], Any]
# what, aim, measured
Row = tuple[str, str, str]


def parameters(number: int, shape: tuple[int, ...] = (16,)) -> list[torch.nn.Parameter]:
    """Return parameters that have a gradient."""
    random = torch.Generator().manual_seed(0)
    found = [torch.nn.Parameter(torch.randn(shape, generator=random) * 0.02) for _ in range(number)]
    for p in found:
        p.grad = torch.randn(shape, generator=random)
    return found


def nothing() -> None:
    """Put nothing back: a clip that has scaled gradients to its bound does the same work again."""


def interleaved(calls: Sequence[Call], times: int, rounds: int = ROUNDS) -> list[list[float]]:
    """Return the seconds of every call in each round, behind a first round that does not count."""
    found = [[sample(CPU, nothing, call, times).host for call in calls] for _ in range(rounds + 1)]
    return [list(each) for each in zip(*found[1:], strict=True)]


def number_of_tensors(rounds: int) -> Iterator[Row]:
    """Measure updates of more and more tensors of 16 elements."""
    fixed, each = (50, 3.0) if kernels() is None else (15, 0.8)
    for number, updates in UPDATES.items():
        own, hand = parameters(number), parameters(number)
        calls = [metaopt.build(own, FULL).step, by_hand(hand)]
        stack, torch_s = interleaved(calls, updates, rounds)
        own_us, hand_us = median(stack) * 1e6, median(torch_s) * 1e6
        yield (
            f"an update of {number:,} tensors of 16 elements",
            f"{fixed + each * number:,.0f} us",
            f"{own_us:,.0f} us; {ratios(stack, torch_s).median:.2f} of by hand, {hand_us:,.0f} us",
        )


class EightOperations(Wrapper):
    """What an author may write: slow weights that follow, the faster the farther they are behind; then a pull."""

    slow = anchor()

    @elementwise
    @staticmethod
    def follow(param: Tensor, slow: Tensor) -> dict[str, Tensor]:
        way = param - slow
        size = torch.abs(way)
        share = size / (size + 0.01)
        slow = slow + (way * share) * 0.1
        return {"slow": slow, "param": torch.lerp(param, slow, 0.01)}

    def after_update(self, group: Group) -> None:
        self.follow(group)


def eight_wrappers(rounds: int) -> Iterator[Row]:
    """Measure what eight wrappers add to `adamw` on `large`, beside the time that their bytes take."""
    yield (
        "eight elementwise wrappers on `large`, to their bytes",
        "2.0" if kernels() is None else "1.4",
        added_to_bytes(EIGHT, rounds),
    )


def one_wrapper(rounds: int) -> Iterator[Row]:
    """Measure what one wrapper adds likewise."""
    library = kernels() is not None
    for spec in ONE:
        label = f"`{spec}` on `large`, to the wrapper's bytes".replace("|", r"\|")
        yield label, "1.25" if library else "1.3", added_to_bytes(spec, rounds)


def own_rule(rounds: int) -> Iterator[Row]:
    """Measure what an author's rule of eight operations adds likewise."""
    aim = "none" if kernels() is None else "1.5"
    added = added_to_bytes(adamw | EightOperations(), rounds)
    yield "an author's rule of eight operations on `large`, to its bytes", aim, added


def added_to_bytes(spec: Any, rounds: int) -> str:
    """Return the time that an update of a stack takes beyond that of `adamw`, as a multiple of its parts' bytes."""
    tensors = make_tensor_set("large")
    own, alone = tensors.parameters(), tensors.parameters()
    stack, base = metaopt.build(own, spec), metaopt.build(alone, "adamw")
    steps = steps_of_update(stack)
    moved = steps * sum(size for label, size in least_bytes(tensors, spec).items() if label)
    probe = Probe()

    def update(params: list[tuple[str, torch.nn.Parameter]], step: Call, steps: int = 1) -> float:
        return steps * sample(CPU, lambda: tensors.restore(params), step, 5 * steps).host

    found = []
    for _ in range(rounds + 1):
        must = moved / probe.measure()
        found.append((update(own, stack.step, steps) - update(alone, base.step)) / must)
    return f"{median(found[1:]):.2f} ({moved / tensors.elements:.0f} bytes an element)"


def many_groups(rounds: int) -> Iterator[Row]:
    """Measure 200 tensors in 100 groups, beside torch with the same groups."""
    own, hand = parameters(2 * GROUPS, (16, 16)), parameters(2 * GROUPS, (16, 16))
    groups = [[{"params": params[i : i + 2]} for i in range(0, len(params), 2)] for params in (own, hand)]
    calls = [metaopt.build(groups[0], FULL).step, by_hand(hand, torch.optim.AdamW(groups[1], fused=True).step)]
    stack, torch_s = interleaved(calls, 20, rounds)
    yield f"an update of {GROUPS} groups, to by hand", "1.1", f"{ratios(stack, torch_s).median:.2f}"


def building(rounds: int) -> Iterator[Row]:
    """Measure making a stack, when everything is imported."""
    params = parameters(BUILT)
    calls: list[Call] = [lambda: metaopt.build(params, FULL), lambda: torch.optim.AdamW(params, fused=True)]
    stack, torch_s = interleaved(calls, 1, rounds)
    yield (
        f"building over {BUILT:,} tensors",
        "40 ms",
        f"{median(stack) * 1e3:.0f} ms; `AdamW(fused=True)` {median(torch_s) * 1e3:.0f} ms",
    )


def checkpoints(rounds: int) -> Iterator[Row]:
    """Measure taking and loading state, beside that of torch's AdamW."""
    for spec in ("adamw", FULL):
        own, bare = parameters(SAVED), parameters(SAVED)
        optimizers = [metaopt.build(own, spec), torch.optim.AdamW(bare, fused=True)]
        for opt in optimizers:
            opt.step()
        taken = interleaved([opt.state_dict for opt in optimizers], 5, rounds)
        saved = [opt.state_dict() for opt in optimizers]
        loads = [lambda o=opt, s=state: o.load_state_dict(s) for opt, state in zip(optimizers, saved, strict=True)]
        loaded = interleaved(loads, 2, rounds)
        for what, most, times in (("state_dict", "1.5", taken), ("load_state_dict", "1.3", loaded)):
            label = f"`{what}` of `{spec}`, {SAVED:,} tensors, to the base's".replace("|", r"\|")
            yield label, most, f"{ratios(*times).median:.2f} ({median(times[0]) * 1e3:.2g} ms)"


def memory(rounds: int) -> Iterator[Row]:
    """Measure the memory that an update takes for a moment, of the whole process: the library's is not torch's."""
    tensors = make_tensor_set("large")
    params = tensors.parameters()
    opt = metaopt.build(params, FULL)
    taken = []
    for _ in range(1 + rounds):
        tensors.restore(params)
        taken.append(peak_bytes(opt.step))
    what = "memory of an update of `large` beyond the state"
    yield what, f"{CPU_BLOCK * 4 / 1e6:.1f} MB", f"{max(taken[1:]) / 1e6:.1f} MB"


def peak_bytes(call: Call) -> int:
    """Return by how much resident memory grew for a moment during a call; Linux only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free and still resident would hide what the call takes
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew at what is resident now
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


def _resident(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def main(rounds: int) -> None:
    """Print a table as Markdown."""
    torch.set_num_threads(1)
    library = kernels()
    print(f"{machine_line(machine('cpu'))}, {datetime.date.today().isoformat()}, ", end="")
    print("without metaopt-kernels" if library is None else f"metaopt-kernels ({library.variant})")
    print("\n| what | at most | measured |\n| --- | --- | --- |")
    long = (eight_wrappers, own_rule, one_wrapper)
    for measured in (number_of_tensors, many_groups, building, checkpoints, *long, memory):
        for row in measured(max(3, rounds // 2) if measured in long else rounds):
            print(f"| {' | '.join(row)} |", flush=True)
            if "-v" in sys.argv:
                print(f"{time.thread_time():.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS)
