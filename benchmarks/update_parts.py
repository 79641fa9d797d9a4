"""`python -m benchmarks.update_parts`: what parts between the base and the weights cost, beside AdamW alone.

State and checkpoint in bytes per byte of the parameters, peak temporary memory of one update likewise, and the time
of an update against AdamW alone, interleaved, on the transformer's shapes.
"""

import io
import statistics
import time

import torch

import metaopt
from benchmarks.memory import watch_memory
from metaopt.lab.shapes import shapes_of

SPECS = ("adamw", "adamw | update_floor | radial_brake | cautious_decay", "adamw | cautious", "adamw | cautious_decay")


def main(rounds: int = 15) -> None:
    """Print one line for each stack."""
    torch.set_num_threads(1)
    runs = []
    for spec in SPECS:
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, generator=generator) * 0.02) for _, s in shapes_of("transformer")]
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator) * 0.01
        opt = metaopt.build(params, spec)
        opt.step()
        runs.append((spec, params, opt))
    seconds: dict[str, list[float]] = {spec: [] for spec in SPECS}
    for _ in range(rounds):
        for spec, _, opt in runs:
            began = time.thread_time()
            opt.step()
            seconds[spec].append(time.thread_time() - began)
    alone = seconds[SPECS[0]]
    for spec, params, opt in runs:
        own = sum(p.numel() * p.element_size() for p in params)
        state = sum(t.numel() * t.element_size() for s in opt.state.values() for t in s.values())
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        peak = watch_memory(opt.step).peak
        ratio = statistics.median(a / b for a, b in zip(seconds[spec], alone, strict=True))
        print(
            f"{spec:62} state {state / own:.2f}x  checkpoint {file.tell() / own:.2f}x  "
            f"temporary {peak / own:.2f}x  time {ratio:.2f}x ({statistics.median(seconds[spec]) * 1e3:.1f} ms)"
        )


if __name__ == "__main__":
    main()
