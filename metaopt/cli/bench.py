"""`metaopt bench`: what an update costs here, beside that of the bare base."""

import json
from collections.abc import Callable
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from metaopt.cli import Plugins, progress_of

FEWEST_ROUNDS = 20


class Dtypes(StrEnum):
    """What parameters can be made of."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bench")(bench)


def bench(
    specs: Annotated[list[str], typer.Argument(metavar="SPEC...", help="The stacks to measure.")],
    shapes: Annotated[
        str, typer.Option(metavar="SET,...", help="Of the parameters: tiny, transformer, large, many.")
    ] = "tiny,transformer,large",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds; fewer than 20 are a rough look.")] = 20,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    dtype: Annotated[Dtypes, typer.Option(help="Of the parameters.")] = Dtypes.FLOAT32,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch; its own choice by default.")] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write what was measured.")] = None,
    plugin: Plugins = [],  # noqa: B006  typer reads the default, nothing changes it
) -> None:
    """Measure time and state of an update: stacks, and their bases without wrappers, side by side."""
    shapes_module, timing, files = (import_module(f"metaopt.lab.{name}") for name in ("shapes", "timing", "whole_file"))
    import_module("metaopt.lab.device").usable_device(device)
    torch = import_module("torch")
    if threads is not None:
        torch.set_num_threads(threads)
    names = [name.strip() for name in shapes.split(",") if name.strip()]
    specs = list(dict.fromkeys(specs))
    # mistakes are reported before minutes are spent
    for name in names:
        shapes_module.shapes_of(name)
    timing.check_specs(specs)
    if json is not None:
        files.check_writable(json)
    results = []
    with progress_of("rounds") as show:
        for position, name in enumerate(names):
            tensors = shapes_module.make_tensor_set(name, device, getattr(torch, dtype))
            results.append(
                timing.time_specs(specs, tensors, rounds, _counter(show, position * rounds, len(names) * rounds))
            )
    machine = {"device": device, "dtype": str(dtype), "threads": torch.get_num_threads(), "torch": torch.__version__}
    _show(results, machine, rounds)
    if json is not None:
        _write(json, results, machine, files)


def _counter(show: Callable[[int, int], None], done: int, total: int) -> Callable[[], None]:
    def count() -> None:
        nonlocal done
        done += 1
        show(done, total)

    return count


def _show(results: list[Any], machine: dict[str, Any], rounds: int) -> None:
    print(f"{machine['device']}, {machine['dtype']}, {machine['threads']} threads, torch {machine['torch']}")
    for result in results:
        print(f"\n{result.name}: {result.tensors:,} tensors, {result.elements:,} elements\n")
        _print_table([_cells(row, result.parameter_bytes) for row in result.rows])
    print("\n- against the base: time per update over that of the bare base, median [quartiles] of the rounds")
    print("- state: also as a multiple of the parameters")
    if rounds < FEWEST_ROUNDS:
        print(f"- fewer than {FEWEST_ROUNDS} rounds: a rough look, not a measurement")


def _cells(row: Any, parameter_bytes: int) -> dict[str, str]:
    return {
        "spec": row.spec,
        "ms per update": f"{row.seconds.median * 1e3:.3f}",
        "base": row.base,
        "ms of the base": f"{row.base_seconds.median * 1e3:.3f}",
        "against the base": f"{row.ratio.median:.3f} [{row.ratio.low:.3f}, {row.ratio.high:.3f}]",
        "state": f"{row.state_bytes / 1e6:.2f} MB ({row.state_bytes / parameter_bytes:.2f}x)",
        "state of the base": f"{row.base_state_bytes / 1e6:.2f} MB ({row.base_state_bytes / parameter_bytes:.2f}x)",
    }


def _print_table(rows: list[dict[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if console.is_terminal:
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*row.values())
        console.print(table)
        return
    print("| " + " | ".join(rows[0]) + " |")  # Markdown, for a file or an issue
    print("|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(cell.replace("|", "\\|") for cell in row.values()) + " |")


def _write(path: Path, results: list[Any], machine: dict[str, Any], files: Any) -> None:
    from dataclasses import asdict

    document = {"format": 1, "machine": machine, "shapes": {result.name: asdict(result) for result in results}}
    files.write_whole(path, json.dumps(document, indent=1) + "\n")
