"""`metaopt list`: every part by name, with its origin and one line about it."""

import json
import shutil
import sys
from enum import StrEnum
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from metaopt.cli import Plugins, fitted

if TYPE_CHECKING:
    from metaopt.registry import BrokenPlugin, Entry


class Kinds(StrEnum):
    """What can be listed, as a user says it."""

    OPTIMIZERS = "optimizers"
    WRAPPERS = "wrappers"
    SCHEDULES = "schedules"
    SPACES = "spaces"
    TUNERS = "tuners"
    LOGGERS = "loggers"
    PROBLEMS = "problems"


KINDS = tuple(Kinds)


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
    with_hint = sys.stdout.isatty() and not plugin
    print(_as_json(entries, broken) if as_json else _as_lines(entries, broken, with_hint=with_hint))


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


def _as_lines(entries: "list[Entry]", broken: "list[BrokenPlugin]", *, with_hint: bool = False) -> str:
    lines = _for_a_terminal(entries) if sys.stdout.isatty() else _for_a_pipe(entries)
    offered = {entry.name: [other.origin for other in entries if other.name == entry.name] for entry in entries}
    twice = {name: origins for name, origins in offered.items() if len(origins) > 1}
    if not entries:
        lines.append("nothing is registered here")
    if with_hint:
        lines += ["", "parts in a module of your own are listed with --plugin MODULE"]
    if twice:
        lines += ["", "names that several plugins offer, so that none can be used"]
        lines += [f"  {name}: {' and '.join(origins)}" for name, origins in twice.items()]
    if broken:
        lines += ["", "broken plugins", *(f"  {plugin.name}: {' '.join(plugin.error.split())}" for plugin in broken)]
    return fitted("\n".join(lines))


def _for_a_pipe(entries: "list[Entry]") -> list[str]:
    """Return whole lines, each with everything on it."""
    names = max((len(entry.name) for entry in entries), default=0)
    origins = max((len(_origin(entry)) for entry in entries), default=0)
    lines: list[str] = []
    for kind, members in groupby(entries, lambda entry: entry.kind):
        lines += ["", f"{kind}s"] if lines else [f"{kind}s"]
        lines += [f"  {entry.name:{names}}  {_origin(entry):{origins}}  {entry.description}" for entry in members]
    return lines


def _for_a_terminal(entries: "list[Entry]") -> list[str]:
    """Return one line per part, as long as the terminal is wide: the origin stands above those that share it."""
    width = shutil.get_terminal_size().columns
    lines: list[str] = []
    ordered = sorted(
        entries, key=lambda entry: (KINDS.index(f"{entry.kind}s"), entry.origin != "metaopt", entry.origin)
    )
    for (kind, origin), shared in groupby(ordered, lambda entry: (entry.kind, _origin(entry))):
        members = list(shared)
        names = max(len(entry.name) for entry in members)
        lines += [""] * bool(lines) + [f"{kind}s of {origin}"]
        told = [f"  {entry.name:{names}}  {entry.description}" for entry in members]
        lines += [line if len(line) <= width else f"{line[: width - 3]}..." for line in told]
    return lines
