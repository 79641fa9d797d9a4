"""`metaopt diff`: how the optimizers in two checkpoint files differ."""

from pathlib import Path
from typing import Annotated

import typer

from metaopt.cli import fitted

DIFFERENT = 1  # as diff's own status


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("diff")(diff)


def diff(
    first: Annotated[Path, typer.Argument(help="A checkpoint: a file, or a client's folder.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    optimizer: Annotated[int | None, typer.Option(min=0, help="Which optimizer, if a file holds several.")] = None,
) -> int:
    """Tell how the optimizers in two checkpoints differ; the status is 1 if they do, 0 if they continue alike.

    Reads files of torch.save, Lightning, Accelerate, the Hugging Face Trainer and metaopt; runs nothing in them.
    """
    from metaopt.lab.difference import differences, summary
    from metaopt.lab.saved_optimizers import read

    a, b = read(first, optimizer), read(second, optimizer)
    for path, saved in ((first, a), (second, b)):
        print(fitted(f"{path}: {summary(saved)}", hanging=2))
    found = differences(a, b)
    for line in found or ["the two are the same"]:
        print(fitted(line, hanging=12))
    return DIFFERENT if found else 0
