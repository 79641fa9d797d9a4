"""The text of a pipeline as a tree of syntax, within limits, and errors that point at their place in it."""

import ast
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from metaopt.errors import MetaoptError, SpecError

Fault = TypeVar("Fault", bound=MetaoptError)

LONGEST = 64 * 1024
DEEPEST = 200
MOST_PARTS = 200
# of a line with a caret below it
WIDEST = 100
ALLOWED = (
    "a pipeline is parts joined by `|`; a number, a tuple, a list or a schedule stands in the brackets of a part, "
    "as in adamw(lr=warmup(cosine(1e-3)))"
)

# strings and comments, each taken whole, also one that never ends: every character is looked at once
_OPAQUE = re.compile(
    r"'''(?:[^\\']|\\(?:.|\Z)|'(?!''))*+(?:'''|\Z)"
    r'|"""(?:[^\\"]|\\(?:.|\Z)|"(?!""))*+(?:"""|\Z)'
    r"|'(?:[^\\'\n]|\\(?:.|\Z))*+(?:['\n]|\Z)"
    r'|"(?:[^\\"\n]|\\(?:.|\Z))*+(?:["\n]|\Z)'
    r"|#[^\n]*+",
    re.DOTALL,
)

_ENDS_OF_LINES = re.compile(r"[\r\n\f\v]")


def _in_one_line(text: str) -> str:
    """Return a text with a space for each end of a line, except in strings: a pipeline may be written in a block."""
    pieces, begin = [], 0
    for opaque in _OPAQUE.finditer(text):
        pieces += [_ENDS_OF_LINES.sub(" ", text[begin : opaque.start()]), opaque.group()]
        begin = opaque.end()
    return "".join([*pieces, _ENDS_OF_LINES.sub(" ", text[begin:])])


class Source:
    """One text, read by Python's own parser and by nothing that evaluates; its lines count as one."""

    def __init__(self, text: str) -> None:
        self.text = _in_one_line(text.strip())

    def tree(self) -> ast.expr:
        """Return the expression that the text is. Raises SpecError, for text too long or too deep as well."""
        if len(self.text.encode(errors="surrogatepass")) > LONGEST:
            raise SpecError(f"the spec is longer than {LONGEST // 1024} KiB")
        if not self.text:
            raise SpecError(
                "the spec is empty; write for instance: clip_grad_norm(1.0) | adamw(lr=3e-4) | lookahead(k=5)"
            )
        self._check_limits(_OPAQUE.sub(self._blank, self.text))
        try:
            return ast.parse(self.text, mode="eval").body
        except (MemoryError, RecursionError):  # of the parser's stack: signs and operators nest without brackets
            raise SpecError("the spec is nested too deeply") from None
        except (SyntaxError, ValueError, OverflowError) as error:
            raise self._unreadable(error) from None

    def _blank(self, found: re.Match[str]) -> str:
        """Return spaces in place of a string's characters, which stand for nothing; refuse all but plain strings."""
        begin = found.start()
        if found.group().startswith("#"):
            # in a text that was folded into one line a comment would take the parts behind it along
            raise self.mark(SpecError(f"the spec does not allow comments (column {begin + 1})"), begin, found.end())
        if begin and (self.text[begin - 1].isalnum() or self.text[begin - 1] == "_"):
            raise self.mark(
                SpecError(f"the spec allows plain strings alone, without a prefix (column {begin})"),
                begin - 1,
                found.end(),
            )
        return " " * len(found.group())

    def _check_limits(self, bare: str) -> None:
        depth = 0
        for position, character in enumerate(bare):
            depth += (character in "([{") - (character in ")]}")
            if depth > DEEPEST:
                error = SpecError(f"the spec's brackets are more than {DEEPEST} deep (column {position + 1})")
                raise self.mark(error, position, position + 1)
        if bare.count("|") >= MOST_PARTS:
            raise SpecError(f"the spec has more than {MOST_PARTS} parts")

    def _unreadable(self, error: Exception) -> SpecError:
        place = getattr(error, "offset", None)
        reason = " ".join(str(getattr(error, "msg", None) or error).split())
        at = f" at column {place}" if place else ""
        told = SpecError(f"the spec {self.text!r:.120} cannot be read{at}: {reason}")
        return self.mark(told, place - 1, place) if place and getattr(error, "lineno", 1) == 1 else told

    def refused(self, node: ast.AST, why: str = ALLOWED) -> SpecError:
        """Return the error for a piece of syntax that no pipeline has."""
        begin, end = self._place(node)
        shown = self.text[begin:end] or type(node).__name__
        return self.mark(SpecError(f"the spec does not allow {shown!r:.60} (column {begin + 1}): {why}"), begin, end)

    @contextmanager
    def pointing_at(self, node: ast.AST) -> Iterator[None]:
        """Have an error that is raised inside point at this piece of the text, unless it points already."""
        try:
            yield
        except MetaoptError as error:
            if not hasattr(error, "__notes__"):
                self.mark(error, *self._place(node))
            raise

    def mark(self, error: Fault, begin: int, end: int) -> Fault:
        """Add the text to an error as a note, with carets under a range of it."""
        if not self.text.isprintable():  # control characters would move the carets
            return error
        end = max(begin + 1, min(end, len(self.text)))
        left = max(0, min(begin - WIDEST // 4, len(self.text) - WIDEST))
        line = self.text[left : left + WIDEST]
        before, behind = ("..." if left else ""), ("..." if left + WIDEST < len(self.text) else "")
        carets = "^" * max(1, min(end, left + WIDEST) - begin)
        error.add_note(f"  {before}{line}{behind}\n  {' ' * (len(before) + begin - left)}{carets}")
        return error

    def _place(self, node: ast.AST) -> tuple[int, int]:
        """Return where a node begins and ends, in characters; python counts bytes."""
        begin, end = getattr(node, "col_offset", 0), getattr(node, "end_col_offset", None) or 0
        line = self.text.encode(errors="surrogatepass")
        begin, end = (len(line[:place].decode(errors="replace")) for place in (begin, end))
        return begin, end
