"""All pages that come from the code."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from metaopt.cli import make_app
from site_pages import parts

ROOT = Path(__file__).parent.parent.parent


def generated() -> dict[str, str]:
    """Return the generated pages by their path below docs/."""
    return {**parts.pages(), **generated_without_parts()}


def generated_without_parts() -> dict[str, str]:
    """Return the generated pages that need no runs."""
    return {
        "api/command-line.md": _command_line(),
        "changelog.md": _changelog(),
        "examples.md": _examples(),
    }


def navigation_of_parts() -> list[Any]:
    """Return what the navigation shows under Parts."""
    return parts.navigation()


def _changelog() -> str:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return re.sub(r"\[docs/([^]]*)\]\(docs/", r"[\1](", text)


def _examples() -> str:
    lines = ["# Examples", "Each script shows one idea. They are in the folder `examples` of a checkout."]
    for file in sorted((ROOT / "examples").glob("*.py")):
        text = file.read_text(encoding="utf-8")
        said = " ".join((ast.get_docstring(ast.parse(text)) or "").split())
        code = re.sub(r'\A""".*?"""\n+', "", text, flags=re.DOTALL)
        lines += [f"## {file.stem}", said, f'```py title="examples/{file.name}"\n{code}```']
    return "\n\n".join(lines) + "\n"


def _command_line() -> str:
    """Return every command with what it takes, from the commands themselves."""
    command = typer.main.get_command(make_app())
    lines = ["# The command line", "`metaopt COMMAND --help` prints the same."]
    for name, sub in sorted(command.commands.items()):  # type: ignore[attr-defined]
        said = " ".join((sub.help or "").split())
        lines += [
            f"## metaopt {name}",
            said,
            "| option or argument | meaning |\n|---|---|\n" + "\n".join(_options(sub)),
        ]
    return "\n\n".join(lines) + "\n"


def _options(command: Any) -> Iterator[str]:
    for given in command.params:
        called = ", ".join(given.opts) if given.opts[0].startswith("-") else given.metavar or given.name.upper()
        default = given.default
        shown = (
            f" (default: `{default}`)" if isinstance(default, str | int | float) and default not in ("", False) else ""
        )
        help_text = " ".join((getattr(given, "help", "") or "").split())
        yield f"| `{called}` | {help_text}{shown} |".replace("||", "\\|\\|")
