"""`metaopt compare`: which of these optimizers is better on this problem."""

from pathlib import Path
from typing import Annotated, Any

import typer

from metaopt.cli import Plugins


def compare(
    specs: Annotated[list[str] | None, typer.Option("-o", "--optimizer", metavar="SPEC", help="A contender.")] = None,
    baseline: Annotated[str | None, typer.Option(help="The contender to compare with; the first by default.")] = None,
    problem: Annotated[str, typer.Option(help="What is trained; see: metaopt list problems.")] = "digits",
    seeds: Annotated[int, typer.Option(help="Seeds of the final runs.")] = 10,
    steps: Annotated[int | None, typer.Option(help="Updates per run; the problem's own by default.")] = None,
    lrs: Annotated[int, typer.Option(help="Learning rates in the grid.")] = 5,
    no_tune: Annotated[bool, typer.Option("--no-tune", help="Use the rates in the specs; names no winner.")] = False,
    jobs: Annotated[int, typer.Option(help="Processes; times are printed with 1 alone.")] = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="Where results go; an interrupted comparison continues there.")] = Path(
        "runs/compare"
    ),
    plugin: Plugins = [],  # noqa: B006 - typer reads the default and never changes it
) -> None:
    """Compare optimizers: tune each on validation data, train the best rates with other seeds, test once."""
    import importlib

    from metaopt.errors import LogError, ProblemError

    try:
        figures = importlib.import_module("metaopt.lab.figures")
        comparing = importlib.import_module("metaopt.lab.compare")
        report = importlib.import_module("metaopt.lab.report")
    except ImportError as error:
        raise ProblemError(f"compare needs {error.name}: pip install 'metaopt-torch[lab]'") from None
    plan = comparing.plan_comparison(
        problem=problem,
        specs=specs or (),
        baseline=baseline,
        seeds=seeds,
        steps=steps,
        lrs=lrs,
        tune=not no_tune,
        device=device,
        out=out,
        jobs=jobs,
        plugins=plugin,
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LogError(f"results cannot be written to {out}: {error.strerror}") from None
    contenders = _with_progress(comparing, plan)
    report.write_results(plan, contenders)
    figures.draw_curves(plan, contenders)
    if plan.tune:
        figures.draw_sensitivity(plan, contenders)
    _print(report.rows(plan, contenders), report.remarks(plan, contenders), out)


def _with_progress(comparing: Any, plan: Any) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        return comparing.run_comparison(plan)
    columns = (TextColumn("training runs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("runs", total=None)
        return comparing.run_comparison(plan, lambda done, total: bar.update(task, completed=done, total=total))


def _print(table: list[dict[str, str]], remarks: list[str], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if console.is_terminal:
        shown = Table(*table[0])
        for row in table:
            shown.add_row(*row.values())
        console.print(shown)
    else:
        for row in table:
            print("; ".join(f"{name}: {value}" for name, value in row.items() if value))
    for remark in remarks:
        print(remark)
    print(f"written to {out}: report.md, results.json, curves.png, sensitivity.png, tensorboard/")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(compare)
