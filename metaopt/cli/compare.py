"""`metaopt compare`: which of these optimizers is better on this problem."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from metaopt.cli import Interrupted, Plugins, Progress, fitted, progress_of


def compare(
    specs: Annotated[
        list[str] | None, typer.Option("-o", "--optimizer", metavar="SPEC", help="A contender; give two or more.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="SPEC", help="The contender to compare with; the first by default.")
    ] = None,
    problem: Annotated[str, typer.Option(help="What is trained; see: metaopt list problems.")] = "digits",
    seeds: Annotated[int, typer.Option(help="Seeds of the final runs.")] = 10,
    steps: Annotated[
        int | None, typer.Option(help="Gradient evaluations per run; the problem's own number by default.")
    ] = None,
    lrs: Annotated[int, typer.Option(help="Learning rates in the grid.")] = 5,
    lr_min: Annotated[float, typer.Option(help="The grid's lowest rate.")] = 1e-3,
    lr_max: Annotated[float, typer.Option(help="The grid's highest rate; those between are log-spaced.")] = 0.5,
    no_tune: Annotated[bool, typer.Option("--no-tune", help="Use the rates in the specs; names no winner.")] = False,
    jobs: Annotated[int, typer.Option(help="Processes, one thread each; times are shown with 1 alone.")] = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="Where results go; an interrupted comparison continues there.")] = Path(
        "runs/compare"
    ),
    plugin: Plugins = [],  # noqa: B006 - typer reads the default and never changes it
) -> None:
    """Compare optimizers: tune each on validation data, train the best rates with other seeds, test once."""
    figures, comparing, planning, report = _lab()
    plan = planning.plan_comparison(
        problem=problem,
        specs=specs or (),
        baseline=baseline,
        seeds=seeds,
        steps=steps,
        lrs=lrs,
        lr_min=lr_min,
        lr_max=lr_max,
        tune=not no_tune,
        device=device,
        out=out,
        jobs=jobs,
        plugins=plugin,
    )
    with _progress(out) as progress:
        contenders = comparing.run_comparison(plan, progress)
        report.write_results(plan, contenders)
        figures.draw_curves(plan, contenders)
        if plan.tune:
            figures.draw_sensitivity(plan, contenders)
    print(report.headline(plan, contenders))
    _print(report.rows(plan, contenders), report.remarks(plan, contenders))
    pictures = "curves.png, sensitivity.png" if plan.tune else "curves.png"
    written = f"Written to {out}: report.md, results.json, {pictures}; look at: "
    print(fitted(f"{written}tensorboard --logdir {out / 'tensorboard'}", hanging=2))


def _lab() -> list[Any]:
    """Return the modules that need the extra `lab`."""
    from importlib import import_module

    from metaopt.errors import ProblemError

    try:
        return [import_module(f"metaopt.lab.{name}") for name in ("figures", "compare", "plan", "report")]
    except ImportError as error:
        raise ProblemError(
            f"compare needs {error.name}: pip install scikit-learn scipy matplotlib (the extra lab)"
        ) from None


@contextmanager
def _progress(out: Path) -> Iterator[Progress]:
    """Show how far the runs are; tell an interrupted user what is kept and how to go on."""
    finished = (0, 0)
    with progress_of("training runs") as show:

        def progress(done: int, total: int) -> None:
            nonlocal finished
            finished = done, total
            show(done, total)

        try:
            yield progress
        except KeyboardInterrupt:
            kept = f"{finished[0]} of {finished[1]} training runs are done and kept in {out}" if finished[1] else ""
            raise Interrupted(f"{kept}; the same command goes on from there" if kept else "") from None


# a table of so many columns fits no terminal: one block per contender, the answer first
BLOCK = (
    ("verdict", "difference [95%]", "p (Holm)", "could have shown"),
    ("lr", "weights", "test loss", "diverged"),
    ("target reached", "evaluations", "updates", "seconds"),
)


def _print(table: list[dict[str, str]], remarks: list[str]) -> None:
    for row in table:
        if sys.stdout.isatty():
            told = [", ".join(f"{name}: {row[name]}" for name in line if row.get(name)) for line in BLOCK]
            print(*("", fitted(row["stack"]), *(fitted(f"  {line}") for line in told)), sep="\n")
        else:
            print("; ".join(f"{name}: {value}" for name, value in row.items() if value))
    print(*([""] if sys.stdout.isatty() else []), *(fitted(remark, hanging=2) for remark in remarks), sep="\n")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(compare)
