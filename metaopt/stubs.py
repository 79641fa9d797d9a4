"""What an editor and a type checker see of metaopt: a stub with every part, its hyperparameters and its words."""

import inspect
import math
from collections.abc import Iterable
from typing import Any

import metaopt
from metaopt.docstrings import first_sentence, meanings
from metaopt.errors import MetaoptError
from metaopt.hyperparameters import Hyperparameter
from metaopt.registry import Entry, registry
from metaopt.specs.pipeline import part

HEAD = """# Written by `metaopt stubs`: what an editor completes and a type checker knows. Not to be changed by hand.
{origin}
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

{imports}

__version__: str

# a number, or what it is over time
_Rate = float | Tensor | Schedule | Callable[[int], float]
"""
# a space may stand in the place of any value
RETURNS = {"schedule": "Schedule", "space": "Any", "tuner": "Tuner", "logger": "Logger", "problem": "Problem"}
PLAIN = {int: "int", bool: "bool", str: "str", dict: "Mapping[str, Any]", list: "Sequence[Any]", type(None): "None"}


def stub(*, built_in: bool) -> str:
    """Return the stub of the package `metaopt`, with the parts of all plugins or with its own only.

    With its own only it lets every other name pass: plugins may have registered it.
    """
    entries = [e for e in registry.entries() if "." not in e.name and (e.origin == "metaopt" or not built_in)]
    names = sorted(metaopt._HOMES.items(), key=lambda pair: (pair[1], pair[0]))
    imports = [f"from metaopt.{home} import {name} as {name}" for name, home in names]
    origins = sorted({f"{e.origin} {e.version}".strip() for e in entries if e.origin != "metaopt"})
    head = HEAD.format(
        origin="# With the parts of " + ", ".join(origins) if origins else "# With metaopt's own parts.",
        imports="\n".join(sorted([*imports, "from metaopt.specs.pipeline import Part as _Part"])),
    )
    found = [_part(entry) for entry in entries]
    if built_in:
        found.append("# the parts of plugins: `metaopt stubs` writes a stub that knows them")
        found.append("def __getattr__(name: str) -> Any: ...\n")
    return "\n".join([head, *found])


def _part(entry: Entry) -> str:
    """Return the class of one part, whose call knows the hyperparameters, and the part itself."""
    kind = "_" + "".join(word.capitalize() for word in entry.name.split("_"))
    try:
        found = part(entry.name)
        declared = [] if found.is_sequence else list(found.hyperparameters.values())
    except (MetaoptError, TypeError, ValueError):  # a plugin's class whose signature cannot be read
        declared = []
        open_ended = True
    else:
        open_ended = not declared and entry.kind not in ("wrapper", "problem")  # sequence takes what it is given
    arguments = ["self", *(_argument(h, declared[:i]) for i, h in enumerate(declared))]
    arguments += ["*args: Any", "**kwargs: Any"] if open_ended else []
    arguments += ["*", "label: str | None = None"] if entry.kind == "wrapper" and not open_ended else []
    call = f"    def __call__({', '.join(arguments)}) -> {RETURNS.get(entry.kind, '_Part')}:"
    return f"class {kind}(_Part):\n{call}\n{_quoted(entry, declared)}\n{entry.name}: {kind}\n"


def _argument(h: Hyperparameter, before: Iterable[Hyperparameter]) -> str:
    name = h.name
    if h.required:
        # python has no required argument behind one that may be left out
        return f"{name}: {_type(h)}" + (" = ..." if any(not other.required for other in before) else "")
    finite = not isinstance(h.default, float) or math.isfinite(h.default)
    literal = finite and (h.default is None or isinstance(h.default, bool | int | float | str))
    return f"{name}: {_type(h)} = {h.default!r}" if literal else f"{name}: {_type(h)} = ..."


def _type(h: Hyperparameter) -> str:
    if h.choices is not None:
        return f"Literal[{', '.join(map(repr, h.choices))}]"
    found = []
    for kind in h.alternatives():
        origin: Any = getattr(kind, "__origin__", kind)
        if kind is float:
            found.append("_Rate")
        elif origin is tuple:
            found.append("Sequence[Any]")
        elif origin in PLAIN:
            found.append(PLAIN[origin])
        else:
            return "Any"
    return " | ".join(dict.fromkeys(found)) or "Any"


def _quoted(entry: Entry, declared: list[Hyperparameter]) -> str:
    told = meanings(entry.target)
    rows = [(h.name, h.doc or told.get(h.name, "")) for h in declared]
    lines = [" ".join(entry.description.split())]
    if any(meaning for _, meaning in rows):
        lines += ["", "Args:", *(f"    {name}: {first_sentence(meaning)}" for name, meaning in rows)]
    text = inspect.cleandoc("\n".join(lines)).replace("\\", "\\\\").replace('"""', "'''")
    body = "\n".join(f"        {line}" if line else "" for line in text.splitlines()).lstrip()
    end = "\n        " if len(lines) > 1 else " " if body.endswith('"') else ""
    return f'        """{body}{end}"""\n'
