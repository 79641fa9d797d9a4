"""`metaopt eject`: a stack as one file without metaopt."""

from pathlib import Path
from typing import Annotated

import typer

from metaopt.errors import SpecError


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

    text = eject(spec, steps)
    if out is None:
        print(text, end="")
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SpecError(f"{out} cannot be written: {error.strerror or error}") from None
    print(f"wrote {out}")
