"""What Python-Markdown makes of tables and code, changed to what the pages mean."""

import re

# code of one word, short enough for a line of a telephone
WORD = re.compile(r"<code>(?=[^<\s]*[-.\[/])([^<\s]{2,24})</code>")
CELL = re.compile(r"<td[^>]*>.*?</td>", re.DOTALL)


def with_pipes(html: str) -> str:
    """Return a page with `|` for each `\\|` in its tables: GitHub needs the backslash, Python-Markdown shows it."""
    return CELL.sub(lambda cell: cell[0].replace("\\|", "|"), html)


def with_whole_words(html: str) -> str:
    """Return a page that does not break a short word of code, such as `--lr-min`, at its hyphens."""
    return WORD.sub(r'<code class="word">\1</code>', html)
