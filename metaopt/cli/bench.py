"""`metaopt bench`: what an update costs here, beside what people write by hand."""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from metaopt.cli import Plugins

DEFAULT_SPEC = "clip_grad_norm(1.0) | adamw | lookahead(k=5)"


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
    specs: Annotated[list[str] | None, typer.Argument(metavar="[SPEC]...", help="The stacks to measure.")] = None,
    shapes: Annotated[
        str, typer.Option(metavar="SET,...", help="tiny, transformer, large, many; with --targets all by default.")
    ] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds; fewer than 20 are a rough look.")] = 20,
    baseline: Annotated[
        str | None, typer.Option(help="What ratios are taken to: a contender's key or text; torch-fused by default.")
    ] = None,
    targets: Annotated[bool, typer.Option("--targets", help="Check the project's own promises instead.")] = False,
    only: Annotated[str, typer.Option(metavar="TARGET,...", help="With --targets: these alone.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    dtype: Annotated[Dtypes, typer.Option(help="Of the parameters.")] = Dtypes.FLOAT32,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch; its own choice by default.")] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write what was measured.")] = None,
    plugin: Plugins = [],  # noqa: B006  typer reads the default, nothing changes it
) -> None:
    """Measure time, memory and bytes of an update: stacks, and their equals written by hand, side by side."""
    # the profiler reports its own start and stop, and every tensor that is older than it, on standard error
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    running = importlib.import_module("metaopt.lab.bench.running")
    report = importlib.import_module("metaopt.lab.bench.report")
    plan = running.plan_bench(
        specs=specs or [DEFAULT_SPEC],
        shapes=_listed(shapes),
        rounds=rounds,
        baseline=baseline,
        targets=targets,
        only=_listed(only),
        device=device,
        dtype=dtype.value,
        threads=threads,
    )
    if json is not None:
        report.check_place(json)  # told before minutes are spent
    with _progress() as say:
        found = running.run_bench(plan, say)
    _show(found, report)
    if json is not None:
        report.write_json(json, found.document())


def _listed(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda what: None
        return
    with console.status("measuring") as status:
        yield lambda what: status.update(what)


def _show(found: Any, report: Any) -> None:
    print(found.heading())
    for heading, table in found.tables():
        print(f"\n{heading}\n")
        _print_table(table, report)
    print()
    for remark in found.remarks():
        print(f"- {remark}")


def _print_table(table: list[dict[str, str]], report: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        print(report.markdown(table))
        return
    shown = Table(*table[0])
    for row in table:
        shown.add_row(*row.values())
    console.print(shown)
