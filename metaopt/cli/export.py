"""`metaopt export`: a stack in the form of a public contest."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from metaopt.cli import write_out


class Form(StrEnum):
    """The contests whose form can be written."""

    algoperf = "algoperf"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export")(export)


def export(
    spec: Annotated[
        str, typer.Argument(metavar="SPEC", help="A pipeline of metaopt's own parts over a torch optimizer.")
    ],
    form: Annotated[Form, typer.Option(help="algoperf: the file submission.py for PyTorch.")] = Form.algoperf,
    out: Annotated[Path | None, typer.Option(help="The file to write; standard output by default.")] = None,
) -> None:
    """Write a stack as a submission to a public contest: one file, without metaopt, with the contest's functions."""
    from metaopt.ejecting.algoperf import submission

    write_out(submission(spec), out)
