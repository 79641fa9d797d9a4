"""`metaopt stubs`: what editors and type checkers know of metaopt, with the parts of the installed plugins."""

from pathlib import Path
from typing import Annotated

import typer

from metaopt.cli import Plugins, write_out
from metaopt.errors import PluginError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("stubs")(stubs)


def stubs(
    out: Annotated[Path, typer.Option(help="The folder: pyright's is typings; give it to mypy as mypy_path.")] = Path(
        "typings"
    ),
    built_in: Annotated[bool, typer.Option("--built-in", help="Only metaopt's own parts, as it is shipped.")] = False,
    plugin: Plugins = [],  # noqa: B006  typer reads the default, nothing changes it
) -> None:
    """Write a stub with every registered part, so that an editor completes and checks those of plugins too."""
    from metaopt.stubs import stub

    write_out(stub(built_in=built_in), out / "metaopt" / "__init__.pyi", PluginError, with_folder=True)
