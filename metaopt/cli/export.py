"""`metaopt export`: a stack in the form of a public contest."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from metaopt.cli import write_out
from metaopt.errors import SpecError


class Form(StrEnum):
    """The contests whose form can be written."""

    algoperf = "algoperf"
    speedrun = "speedrun"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export")(export)


def export(
    spec: Annotated[
        str, typer.Argument(metavar="SPEC", help="A pipeline of metaopt's own parts over torch optimizers.")
    ],
    form: Annotated[
        Form,
        typer.Option(help="algoperf: submission.py for PyTorch; speedrun: modded-nanogpt's optimization track."),
    ] = Form.algoperf,
    into: Annotated[
        Path | None, typer.Option(metavar="FILE", help="speedrun: the track's own script, train_gpt_simple.py.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="speedrun: the steps of the run; the script's own by default.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The file to write; standard output by default.")] = None,
) -> None:
    """Write a stack in the form of a public contest: one file, without metaopt."""
    from metaopt.ejecting.algoperf import submission
    from metaopt.ejecting.speedrun import SCRIPT, WHERE, training_script

    if form is Form.algoperf:
        if into is not None or steps is not None:
            raise SpecError("--into and --steps belong to --form speedrun: leave them out")
        write_out(submission(spec), out)
        return
    if into is None:
        raise SpecError(f"--form speedrun writes into the track's own script: give --into {SCRIPT}, from {WHERE}")
    try:
        script = into.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{into} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    write_out(training_script(spec, script, steps), out)
