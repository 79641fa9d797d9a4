"""`metaopt work`: run the trials that a comparison on `folder` hands out."""

from pathlib import Path
from typing import Annotated

import typer

from metaopt.cli import Plugins


def work(
    out: Annotated[Path, typer.Argument(help="The folder of `metaopt compare --on folder --out`.")],
    idle: Annotated[float, typer.Option(help="Seconds without a task after which it ends.")] = 600.0,
    lease: Annotated[
        float, typer.Option(help="Seconds without a sign of life after which another worker's task is taken over.")
    ] = 30.0,
    plugin: Plugins = [],  # noqa: B006 - typer reads the default and never changes it
) -> None:
    """Run trials of a comparison, on this machine, until there are none; start it on as many machines as you like."""
    from metaopt.errors import ProblemError
    from metaopt.lab.executors.folder import Worker

    if idle <= 0 or lease <= 0:
        raise ProblemError("--idle and --lease must be above 0")
    done = Worker(out, lease).work(idle)
    print(f"{done} trials were run here; nothing was left to do for {idle:g} s")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(work)
