"""Draw the engine into docs/architecture.md, from its imports and the first sentence of each module.

`python docs/draw_architecture.py` rewrites what is between the markers; a test holds the page to the code.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent / "metaopt"
PAGE = Path(__file__).parent / "architecture.md"
BEGIN, END = "<!-- drawn: begin -->\n", "<!-- drawn: end -->\n"
# around the engine: what it stands on, and what stands on it
AROUND = (
    *("errors", "hyperparameters", "deferred", "space", "schedule", "metrics"),
    *("slots", "group", "wrapper", "refusals", "stack", "compiled_step"),
)


def modules() -> dict[str, Path]:
    """Return the modules in the picture, by name."""
    files = [file for file in sorted((ROOT / "engine").rglob("*.py")) if file.stem != "__init__"]
    engine = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {**{name: ROOT / f"{name}.py" for name in AROUND}, **engine}


def imports(file: Path, known: set[str]) -> set[str]:
    """Return which modules of the picture a file imports, also only for annotations."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("metaopt"):
            module = (node.module or "").removeprefix("metaopt").removeprefix(".")
            found |= {module} | {f"{module}.{alias.name}" if module else alias.name for alias in node.names}
    return found & known


def shown(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the arrows without those that follow from others."""

    def reached(start: str) -> set[str]:
        return set().union(*({to} | reached(to) for to in arrows[start])) if arrows[start] else set()

    below = {name: reached(name) for name in arrows}
    return {name: {to for to in tos if not any(to in below[other] for other in tos)} for name, tos in arrows.items()}


def drawn() -> str:
    """Return the picture and the table as Markdown."""
    files = modules()
    boxes: dict[str, set[str]] = {}
    for name, file in files.items():
        boxes.setdefault(_box(name), set()).update(map(_box, imports(file, set(files))))
    arrows = shown({name: tos - {name} for name, tos in boxes.items()})
    lines = ["```mermaid", "flowchart TD"]
    lines += [f"  {_id(n)}[{n}]" for n in boxes if not n.startswith("engine.")]
    lines += ["  subgraph engine", *(f"    {_id(n)}[{n[7:]}]" for n in boxes if n.startswith("engine.")), "  end"]
    lines += [f"  {_id(name)} --> {_id(to)}" for name, tos in arrows.items() for to in sorted(tos)]
    rows = [f"| `{name}` | {_first_sentence(file)} |" for name, file in files.items() if name.startswith("engine.")]
    return "\n".join([*lines, "```", "", "| module | what it holds |", "|---|---|", *rows]) + "\n"


def page() -> str:
    """Return the page with the picture drawn anew."""
    head, _, rest = PAGE.read_text().partition(BEGIN)
    return head + BEGIN + drawn() + END + rest.partition(END)[2]


def _box(name: str) -> str:
    """Return the box of a module: its own, or that of the folder it is in."""
    return ".".join(name.split(".")[:2])


def _id(name: str) -> str:
    return name.replace(".", "_")


def _first_sentence(file: Path) -> str:
    text = " ".join((ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0].split())
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
