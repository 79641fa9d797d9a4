"""`metaopt stubs`: what editors and type checkers know of metaopt, with the parts of the installed plugins."""

from pathlib import Path
from typing import Annotated

import typer

from metaopt.cli import Plugins
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

    file = out / "metaopt" / "__init__.pyi"
    text = stub(built_in=built_in)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PluginError(f"{file} cannot be written: {error.strerror or error}") from None
    print(f"wrote {file}")
