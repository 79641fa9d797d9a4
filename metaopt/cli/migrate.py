"""`metaopt migrate`: a checkpoint of another optimizer, client or stack, made one of this stack."""

from pathlib import Path
from typing import Annotated

import typer

from metaopt.cli import Keep, Plugins, fitted
from metaopt.errors import CheckpointError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("migrate")(migrate)


def migrate(
    old: Annotated[Path, typer.Argument(help="The checkpoint: a file, or a client's folder.")],
    stack: Annotated[str, typer.Option(metavar="SPEC", help="The optimizer that is to go on from it.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; OLD.migrated.pt beside it by default.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be taken; write nothing.")] = False,
    keep: Annotated[Keep, typer.Option(help="Whose constants are in force: the file's or the stack's.")] = Keep.saved,
    extend: Annotated[bool, typer.Option("--extend", help="Allow --total-steps other than the file's.")] = False,
    total_steps: Annotated[int | None, typer.Option(min=1, help="Length of the run; the file's by default.")] = None,
    updates: Annotated[int | None, typer.Option(min=0, help="Updates made; by default as the file says.")] = None,
    optimizer: Annotated[int | None, typer.Option(min=0, help="Which optimizer, if a file holds several.")] = None,
    plugin: Plugins = [],  # noqa: B006  typer reads the default, nothing changes it
) -> None:
    """Make a checkpoint one of another stack: tell what is taken, dropped and begun anew, and write the file.

    Reads files of torch.save, Lightning, Accelerate, the Hugging Face Trainer and metaopt; runs nothing in them.
    """
    from metaopt.lab.migrate import migrate as migrated
    from metaopt.lab.saved_optimizers import read

    saved = read(old, optimizer)
    target = out or saved.file.with_name(f"{saved.file.stem}.migrated{saved.file.suffix}")
    if not dry_run and target.exists():
        raise CheckpointError(f"{target} exists already: give another --out, or --dry-run to write nothing")
    made = migrated(saved, stack, keep=keep.value, extend=extend, total_steps=total_steps, updates=updates)
    for line in made.lines():
        print(fitted(line, hanging=12))
    if dry_run:
        print("nothing was written")
        return
    made.write(target)
    print(f"written: {target}")
