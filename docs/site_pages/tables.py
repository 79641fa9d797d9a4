"""Tables of Markdown, as GitHub and MkDocs read them."""

import re

CELL = re.compile(r"<td[^>]*>.*?</td>", re.DOTALL)


def with_pipes(html: str) -> str:
    """Return a page with `|` for each `\\|` in its tables: GitHub needs the backslash, Python-Markdown shows it."""
    return CELL.sub(lambda cell: cell[0].replace("\\|", "|"), html)
