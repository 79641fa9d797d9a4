"""`python -m benchmarks.ranks WHAT`: several processes that train one model, on this machine, measured.

`exact`: the losses of DDP and FSDP beside those of one process. `resume`: a checkpoint of two FSDP ranks, continued in
other ways. `local`: local updates beside DDP on as many samples, with what each sends. `overhead`: the time and memory
that `metaopt train --parallel ddp` adds to torch's own loop. Each prints a table.
"""

import argparse
import multiprocessing
import os
import resource
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from metaopt import build
from metaopt.lab.dealing import tried
from metaopt.lab.parallel import DataParallel
from metaopt.lab.ranks import joined, this_rank
from metaopt.lab.training import train
from metaopt.registry import registry

STACK = "clip_grad_norm(1.0) | adamw(lr=warmup(cosine(3e-3), 0.1)) | lookahead"
BASE = "adamw(lr=warmup(cosine(3e-3), 0.1))"
OUTER = f"{BASE} | outer(k=30, lr=0.7, momentum=0.9, across='replicas')"
K = 30
# of `overhead`: a model whose step takes some milliseconds
LARGE = {"width": 192, "layers": 3, "context": 64, "batch_size": 16}
ROUNDS, STEPS = 30, 5


def problem_of(**given: Any) -> Any:
    """Return the problem of all tables."""
    return registry.find("charlm", "problem").target(**given)


def together(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call a function on so many ranks, as torchrun starts them; return what each returns."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["metaopt.lab.training", "torch._dynamo"])
    found, processes = [], []
    for rank in range(size):
        reading, writing = context.Pipe(duplex=False)
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = context.Process(target=_rank, args=(env, writing, function, arguments))
        process.start()
        writing.close()
        found.append(reading)
        processes.append(process)
    values = [reading.recv() for reading in found]
    for process in processes:
        process.join()
    return values


def _rank(env: dict[str, Any], writing: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update({key: str(value) for key, value in env.items()})
    torch.set_num_threads(1)
    with joined(this_rank(), "cpu") as ranks:
        value = function(ranks, *arguments)
    writing.send(value)


def _trained(ranks: Any, spec: str, parallel: str, steps: int, how: dict[str, Any]) -> tuple[list[float], float]:
    """Return the losses of all steps, and that on validation data."""
    losses: list[float] = []
    found = train(
        problem_of(),
        spec,
        steps=steps,
        ranks=ranks,
        parallel=parallel,
        progress=lambda _, loss: losses.append(float(loss.detach())),
        **how,
    )
    return losses, found.evaluation["loss"]


# ---- exact


def exact(steps: int) -> Iterator[str]:
    """Yield the table of the losses of one run in three ways."""
    points = [max(1, steps * i // 5) for i in range(1, 6)]
    ways = {"one process": (1, "ddp"), "ddp, 2 ranks": (2, "ddp"), "fsdp, 2 ranks": (2, "fsdp")}
    yield "| loss | " + " | ".join(f"step {p}" for p in points) + " | largest difference |"
    yield "|---" * (len(points) + 2) + "|"
    first: list[float] = []
    for name, (size, parallel) in ways.items():
        losses, _ = together(size, _trained, STACK, parallel, steps, {})[0]
        first = first or losses
        apart = max(abs(a - b) for a, b in zip(losses, first, strict=True))
        yield f"| {name} | " + " | ".join(f"{losses[p - 1]:.7f}" for p in points) + f" | {apart:.1e} |"


# ---- resume


def resume(steps: int) -> Iterator[str]:
    """Yield the table of the ends of a run that other ranks continue."""
    ways = [(2, "fsdp"), (1, "ddp"), (2, "ddp"), (4, "ddp"), (4, "fsdp")]
    with tempfile.TemporaryDirectory() as folder:
        log, half = Path(folder, "whole"), steps // 2
        whole, end = together(2, _trained, STACK, "fsdp", steps, {"log": log, "checkpoint_every": half})[0]
        yield f"| 2 fsdp ranks saved step {half}, continued to {steps} by | final loss | validation | difference |"
        yield "|---|---|---|---|"
        yield f"| nobody: the run was not interrupted | {whole[-1]:.7f} | {end:.7f} | |"
        for size, parallel in ways:
            name = "a single process" if size == 1 else f"{size} {parallel} ranks"
            how = {"log": Path(folder, name), "resume": log / "checkpoints" / f"step-{half:09d}"}
            losses, found = together(size, _trained, STACK, parallel, steps, how)[0]
            same = losses == whole[half:] and found == end
            apart = max(abs(a - b) for a, b in zip(losses, whole[half:], strict=True))
            yield f"| {name} | {losses[-1]:.7f} | {found:.7f} | {'none, bit for bit' if same else f'{apart:.0e}'} |"


# ---- local updates


def _sent(ranks: Any, spec: str, parallel: str, steps: int) -> tuple[int, int]:
    """Return how many collectives a run makes, and of how many bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        _trained(ranks, spec, parallel, steps, {})
    numbers = [
        sum(torch.Size(shape).numel() for shape in event.input_shapes if shape)
        for event in profile.events()
        if event.name.startswith("gloo:")
    ]
    return len(numbers), 4 * sum(numbers)


def local(steps: int, seeds: int = 3) -> Iterator[str]:
    """Yield the table of local updates beside DDP: the loss at the end and what was sent."""
    ways = {"ddp": (BASE, "ddp"), f"local, k={K}": (OUTER, "local")}
    short = 2 * K
    yield f"| 2 ranks, {steps} steps | validation loss, {seeds} seeds | collectives in {short} steps | MB in these |"
    yield "|---|---|---|---|"
    for name, (spec, parallel) in ways.items():
        ends = [together(2, _trained, spec, parallel, steps, {"seed": seed})[0][1] for seed in range(seeds)]
        count, size = together(2, _sent, spec, parallel, short)[0]
        yield f"| {name} | {', '.join(f'{end:.3f}' for end in ends)} | {count} | {size / 1e6:.2f} |"


# ---- overhead


def _loops(ranks: Any, which: str, rounds: int = ROUNDS) -> tuple[dict[str, list[float]], int]:
    """Return the seconds of rounds of each loop, in turn, and the peak of the memory in KiB."""
    problem = problem_of(**LARGE)
    batch = next(problem.batches(0))
    part = batch[ranks.rank * len(batch) // 2 : (ranks.rank + 1) * len(batch) // 2]
    loops: dict[str, Callable[[], None]] = {}
    if which != "metaopt":
        model = problem.model(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)

        def plain() -> None:
            optimizer.zero_grad()
            problem.loss(wrapped, part).backward()
            optimizer.step()

        loops["torch"] = plain
    if which != "torch":
        own = problem.model(0)
        way = DataParallel(problem, own, ranks, tried(problem, own, batch))
        opt = build(way.model.named_parameters(), "adamw(lr=1e-3)")

        def closure() -> torch.Tensor:
            opt.zero_grad()
            return way.backward(batch)

        def ours() -> None:
            opt.step(closure)
            way.has_to_stop()

        loops["metaopt"] = ours
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds + 2):
        for name, loop in loops.items():
            torch.distributed.barrier()
            began = time.perf_counter()
            for _ in range(STEPS):
                loop()
            if number >= 2:
                seconds[name].append((time.perf_counter() - began) / STEPS)
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def overhead(_: int) -> Iterator[str]:
    """Yield what `--parallel ddp` adds to torch's own DDP with the same optimizer."""
    seconds, _peak = together(2, _loops, "both")[0]
    ratios = [a / b for a, b in zip(seconds["metaopt"], seconds["torch"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    yield "| 2 ranks | torch's DDP and AdamW(fused=True) | `--parallel ddp` with adamw | ratio |"
    yield "|---|---|---|---|"
    times = {name: 1e3 * statistics.median(found) for name, found in seconds.items()}
    yield (
        f"| ms for a step, median of {ROUNDS} interleaved rounds | {times['torch']:.2f} | {times['metaopt']:.2f} | "
        f"{middle:.3f} (half of the rounds: {low:.3f} to {high:.3f}) |"
    )
    peaks: dict[str, list[int]] = {"torch": [], "metaopt": []}
    for _ in range(3):
        for name, found in peaks.items():
            found.append(together(2, _loops, name, 1)[0][1])
    mib = {name: statistics.median(found) / 1024 for name, found in peaks.items()}
    ratio = mib["metaopt"] / mib["torch"]
    yield f"| peak of the memory, MiB | {mib['torch']:.1f} | {mib['metaopt']:.1f} | {ratio:.3f} |"


TABLES = {"exact": (exact, 200), "resume": (resume, 100), "local": (local, 300), "overhead": (overhead, 0)}


def main() -> int:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__)
    parser.add_argument("what", nargs="+", choices=TABLES)
    parser.add_argument("--steps", type=int, help="of each run; each table has a number of its own")
    options = parser.parse_args()
    for what in options.what:
        table, steps = TABLES[what]
        for line in table(options.steps or steps):
            print(line, flush=True)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
