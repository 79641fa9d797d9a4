"""`metaopt compare`: which of these optimizers is better on this problem."""

import json
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
    problems: Annotated[
        list[str], typer.Option("--problem", metavar="PROBLEM", help="What is trained; may be repeated. [digits]")
    ] = [],  # noqa: B006
    suite: Annotated[
        str | None, typer.Option(metavar="NAME", help="Problems that belong together, such as small.")
    ] = None,
    studies: Annotated[
        str,
        typer.Option("--studies", "--seeds", metavar="N|auto", help="Tunings per contender; auto: until it is clear."),
    ] = "10",
    trials: Annotated[int, typer.Option("--trials", "--lrs", help="Learning rates that each study tries.")] = 5,
    steps: Annotated[
        int | None, typer.Option(help="Gradient evaluations per run; the problem's own number by default.")
    ] = None,
    lr_min: Annotated[float | None, typer.Option(help="The lowest learning rate; 1e-3 to begin with.")] = None,
    lr_max: Annotated[
        float | None, typer.Option(help="The highest; 0.5 to begin with. Rates move on beyond an end not given.")
    ] = None,
    sensitivity: Annotated[
        str, typer.Option(metavar="lr[,batch_size]", help="What the final loss is shown over; batch_size trains more.")
    ] = "lr",
    no_tune: Annotated[bool, typer.Option("--no-tune", help="Use the rates in the specs; names no winner.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run trials that failed again.")] = False,
    jobs: Annotated[int, typer.Option(help="Processes, one thread each; times are shown with 1 alone.")] = 2,
    on: Annotated[
        str, typer.Option(metavar="NAME[:ADDRESS]", help="Where trials run: local, folder, or of a plugin: ray, slurm.")
    ] = "local",
    retries: Annotated[int, typer.Option(help="How often a trial whose process died is run again.")] = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    figures: Annotated[list[str], typer.Option(metavar="FORM", help="png, pdf or svg; may be repeated.")] = ["png"],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Where results go; an interrupted comparison continues there.")] = Path(
        "runs/compare"
    ),
    all_seeds: Annotated[bool, typer.Option("--all-seeds", help="TensorBoard also gets a run for each study.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json instead of the table.")] = False,
    plugin: Plugins = [],  # noqa: B006 - typer reads the default and never changes it
) -> None:
    """Compare optimizers over studies: each tunes on validation data with a random placement; verdicts are over all."""
    drawing, comparing, named, overall, planning, report, several, results, sensitive = _lab()
    drawing.check_forms(figures)
    problems = [*problems, *(named.suite_named(suite) if suite else ())] or ["digits"]
    plans = [
        planning.plan_comparison(
            problem=problem,
            specs=specs or (),
            baseline=baseline,
            studies=studies,
            trials=trials,
            steps=steps,
            lr_min=lr_min,
            lr_max=lr_max,
            tune=not no_tune,
            device=device,
            out=folder,
            jobs=jobs,
            plugins=plugin,
            on=on,
            retries=retries,
            sensitivity=sensitivity,
        )
        for problem, folder in several.folders(problems, out).items()
    ]
    told = sys.stderr if as_json else sys.stdout
    comparisons = []
    for plan in plans:
        print(fitted(f"{plan.problem}: {plan.promise()}" if len(plans) > 1 else plan.promise(), hanging=2), file=told)
        told.flush()
        with _progress(plan.out) as progress:
            comparisons.append(comparing.run_comparison(plan, progress, retry_failed, all_seeds))
            written = comparisons[-1].save(figures=figures)
        if not as_json:
            _tell(report, sensitive, comparisons[-1], written)
    if as_json:
        found = [results.document(comparison) for comparison in comparisons]
        print(json.dumps(found if len(problems) > 1 else found[0], indent=1))
    if len(comparisons) > 1:
        over_all = overall.Overall(comparisons, out)
        written = over_all.save(figures=figures)
        if not as_json:
            print(f"\nOver all {len(comparisons)} problems")
            _print(over_all.rows(), over_all.remarks())
        print(fitted(f"Written to {out}: {', '.join(path.name for path in written)}", hanging=2), file=told)


def _tell(report: Any, sensitive: Any, comparison: Any, written: list[Path]) -> None:
    """Print what a comparison found, and where it is."""
    print(report.headline(comparison))
    _print(report.rows(comparison), report.remarks(comparison))
    if comparison.at_sizes:
        print("\nSensitivity")
        _print(sensitive.rows(comparison), sensitive.remarks(comparison))
    folder = comparison.folder
    other = "; another comparison is in the folder above" if folder != comparison.plan.out else ""
    names = ", ".join(path.name for path in written)
    print(
        fitted(
            f"Written to {folder}: {names}{other}; look at: tensorboard --logdir {folder / 'tensorboard'}", hanging=2
        )
    )


def _lab() -> list[Any]:
    """Return the modules that need the extra `lab`."""
    from importlib import import_module

    from metaopt.errors import MissingExtra

    names = ("figures", "comparison", "named", "overall", "plan", "report", "several", "results", "sensitivity")
    try:
        return [import_module(f"metaopt.lab.{name}") for name in names]
    except ImportError as error:
        raise MissingExtra("compare", error.name or "a package", "lab") from None


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
    ("verdict", "difference [95%]", "p (Holm)", "better in", "could have shown"),
    ("time to target", "target reached", "evaluations saved"),
    ("test loss", "accuracy", "weights", "diverged"),
    ("lr", "evaluations", "updates", "seconds", "ms per update", "state"),
    ("score [95%]", "solved", "mean rank [95%]", "evaluations saved [95%]"),
)


def _print(table: list[dict[str, str]], remarks: list[str]) -> None:
    for row in table:
        if sys.stdout.isatty():
            others = [name for name in row if name != "stack" and not any(name in line for line in BLOCK)]
            told = [", ".join(f"{name}: {row[name]}" for name in line if row.get(name)) for line in (*BLOCK, others)]
            print(*("", fitted(row["stack"]), *(fitted(f"  {line}") for line in told if line)), sep="\n")
        else:
            print("; ".join(f"{name}: {value}" for name, value in row.items() if value))
    print(*([""] if sys.stdout.isatty() else []), *(fitted(remark, hanging=2) for remark in remarks), sep="\n")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(compare)
