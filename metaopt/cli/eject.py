"""`metaopt eject`: a stack as one file without metaopt."""

from pathlib import Path
from typing import Annotated

import typer

from metaopt.cli import write_out


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("eject")(eject_spec)


def eject_spec(
    spec: Annotated[
        str, typer.Argument(metavar="SPEC", help="A pipeline of metaopt's own parts over a torch optimizer.")
    ],
    steps: Annotated[int | None, typer.Option(min=1, help="Length of the run in updates, for schedules.")] = None,
    out: Annotated[Path | None, typer.Option(help="The file to write; standard output by default.")] = None,
) -> None:
    """Write a stack as one readable Python file that does not need metaopt and trains the same, bit for bit."""
    from metaopt.ejecting.writing import eject

    write_out(eject(spec, steps), out)
