"""`python -m benchmarks.symptoms`: at which update `monitor` shows that a run is ill, and at which the loss does.

Runs of `charlm` with the same batches: one that is well, two whose rates are far too high, and one with a dead layer,
the bias of whose units is so low that none is ever active. What is shown counts from the first of three updates in a
row that differ from the run that is well.
"""

from collections.abc import Callable, Mapping

import torch

import metaopt

UPDATES, ROW = 100, 3
RATE, TOO_HIGH = 3e-3, (3e-2, 1e-1)
DEAD = "blocks.layers.1.linear1"
LOSS = "train/loss"

Point = Mapping[str, float]
Differs = Callable[[Point, Point], bool]


def run(rate: float, dead: bool = False) -> list[dict[str, float]]:
    """Return what the log has of a run, a point per update."""
    problem = metaopt.charlm()
    model = problem.model(seed=0)
    if dead:
        with torch.no_grad():
            model.get_parameter(f"{DEAD}.bias").fill_(-20.0)
    spec = f"adamw(lr={rate}) | monitor(alignment=True)"
    opt = metaopt.build(metaopt.groups(model, no_decay="1d"), spec, log_every=1)
    points = []
    for _, batch in zip(range(UPDATES), problem.batches(seed=0), strict=False):
        opt.zero_grad()
        loss = problem.loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        opt.record(loss=loss.detach())
        opt.step()
        points.append(dict(opt.metrics()))
    opt.close()
    return points


def times(tag: str, factor: float) -> Differs:
    """Return whether a value is so many times that of the run that is well."""
    return lambda ill, well: ill[tag] > factor * well[tag]


def silent(ill: Point, well: Point) -> bool:
    """Return whether a tensor among the five with the smallest gradients has none at all."""
    return any(value == 0.0 for tag, value in ill.items() if tag.startswith("monitor/grad_norm/"))


PANELS: dict[str, Differs] = {
    "loss, 3% above": times(LOSS, 1.03),
    "update_ratio, 3 times": times("monitor/update_ratio", 3.0),
    "last_alignment, 0.5 below": lambda ill, well: (
        ill.get("monitor/last_alignment", 1.0) < well.get("monitor/last_alignment", 1.0) - 0.5
    ),
    "grad_norm, 3 times": times("monitor/grad_norm", 3.0),
    "layers, a gradient of 0": silent,
}


def first(ill: list[dict[str, float]], well: list[dict[str, float]], differs: Differs) -> str:
    """Return the first update of those that differ in a row."""
    seen = [differs(*pair) for pair in zip(ill, well, strict=True)]
    found = next((i for i in range(len(seen)) if len(seen[i : i + ROW]) == ROW and all(seen[i : i + ROW])), None)
    return f"not in {UPDATES}" if found is None else str(found + 1)


def main() -> None:
    """Print a Markdown table: a row for each panel, a column for each ill run."""
    torch.set_num_threads(1)
    well = run(RATE)
    ill = {**{f"lr={rate}": run(rate) for rate in TOO_HIGH}, f"{DEAD} dead": run(RATE, dead=True)}
    print("| shown at update |", " | ".join(ill), "|")
    print("| --- |" + " --- |" * len(ill))
    for panel, differs in PANELS.items():
        print(f"| {panel} |", " | ".join(first(points, well, differs) for points in ill.values()), "|")
    for name, points in {"well": well, **ill}.items():
        values = ", ".join(f"{points[at - 1][LOSS]:.3f} at {at}" for at in (1, 4, 20, UPDATES))
        print(f"{name}: loss {values}; update_ratio {points[0]['monitor/update_ratio']:.2g} at 1")


if __name__ == "__main__":
    main()
