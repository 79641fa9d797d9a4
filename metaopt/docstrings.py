"""What a docstring says of a class: the meaning of its arguments, and where it comes from."""

import inspect
import re
from typing import Any

_ARGUMENT = re.compile(r"^(?P<indent> +)(?P<name>\w+)(?: *\([^)]*\))?: *(?P<meaning>.*)$")
_SECTION = re.compile(r"^(Args|Arguments|Parameters):$")
_DEFAULT = re.compile(r"\s*\(default:.*", re.DOTALL)
_LINK = re.compile(r"https?://[^\s>`]+")
# a full stop that ends a sentence: not that of `e.g.` or of a number
_END = re.compile(r"(?<=[a-z0-9`)])\.(?= [A-Z`]|$)")


def meanings(target: Any) -> dict[str, str]:
    """Return the first sentence about each argument in the `Args:` of a docstring, without the default."""
    found: dict[str, list[str]] = {}
    inside, indent, name = False, 0, ""
    for line in (inspect.getdoc(target) or "").splitlines():
        argument = _ARGUMENT.match(line)
        if _SECTION.match(line):
            inside, indent = True, 0
        elif inside and line and not line.startswith(" "):
            inside = False
        elif inside and argument and len(argument["indent"]) <= (indent or len(argument["indent"])):
            indent, name = len(argument["indent"]), argument["name"]
            found[name] = [argument["meaning"]]
        elif inside and name:
            found[name].append(line.strip())
    return {name: first_sentence(_DEFAULT.sub("", " ".join(lines))) for name, lines in found.items()}


def first_sentence(text: str) -> str:
    """Return the first sentence of a text, in one line and without its full stop."""
    return _END.split(" ".join(text.split()), maxsplit=1)[0]


def links(target: Any) -> list[str]:
    """Return the addresses in a docstring, each once."""
    return list(dict.fromkeys(link.rstrip(".,") for link in _LINK.findall(inspect.getdoc(target) or "")))
