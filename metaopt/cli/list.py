"""`metaopt list`: every part by name, with its origin and one line about it."""

import json
import shutil
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from metaopt.cli import Plugins

if TYPE_CHECKING:
    from metaopt.registry import BrokenPlugin, Entry


class Kinds(StrEnum):
    """What can be listed, as a user says it."""

    OPTIMIZERS = "optimizers"
    WRAPPERS = "wrappers"
    SCHEDULES = "schedules"
    LOGGERS = "loggers"
    PROBLEMS = "problems"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("list")(list_parts)


def list_parts(
    kind: Annotated[Kinds | None, typer.Argument(help="Only this kind of part.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    plugin: Plugins = [],  # noqa: B006  typer reads the default, nothing changes it
) -> None:
    """List the registered parts with their origin, and plugins that are broken with their error."""
    from metaopt.registry import registry

    entries = registry.entries(kind.value.removesuffix("s") if kind else None)
    broken = registry.broken()
    print(_as_json(entries, broken) if as_json else _as_lines(entries, broken))


def _origin(entry: "Entry") -> str:
    return f"{entry.origin} {entry.version}".strip()


def _as_json(entries: "list[Entry]", broken: "list[BrokenPlugin]") -> str:
    parts = [
        {
            "name": entry.name,
            "kind": entry.kind,
            "origin": entry.origin,
            "version": entry.version,
            "description": entry.description,
        }
        for entry in entries
    ]
    return json.dumps({"parts": parts, "broken": [{"name": b.name, "error": b.error} for b in broken]}, indent=2)


def _as_lines(entries: "list[Entry]", broken: "list[BrokenPlugin]") -> str:
    names = max((len(entry.name) for entry in entries), default=0)
    origins = max((len(_origin(entry)) for entry in entries), default=0)
    lines: list[str] = []
    kind = ""
    for entry in entries:
        if entry.kind != kind:
            kind = entry.kind
            lines += ["", f"{kind}s"] if lines else [f"{kind}s"]
        lines.append(f"  {entry.name:{names}}  {_origin(entry):{origins}}  {entry.description}")
    if not entries:
        lines.append("nothing is registered here")
    if broken:
        lines += ["", "broken plugins", *(f"  {plugin.name}: {' '.join(plugin.error.split())}" for plugin in broken)]
    if sys.stdout.isatty():  # a pipe gets whole lines, a terminal lines that fit
        width = shutil.get_terminal_size().columns
        lines = [line if len(line) <= width else f"{line[: width - 3]}..." for line in lines]
    return "\n".join(lines)
