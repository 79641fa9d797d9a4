"""What the texts in a log say of a run: its parts, its spec, the verdicts of a comparison.

A log can be of any program, or damaged: whatever is read here is checked before it is sent to the page.
"""

import ast
import contextlib
import json
import math
from collections.abc import Mapping
from typing import Any

# the text summaries that metaopt writes; the newest point of each counts
STACK, SPEC, VERDICTS = "metaopt/stack", "metaopt/spec", "metaopt/verdicts"
# the curve of a base's rate
RATE = "train/learning_rate"
# what is read of a log at most: characters of a description, a spec and a value; parts and rows; branches in branches
LONGEST, LONGEST_SPEC, LONGEST_VALUE, MOST, DEEPEST = 2_000_000, 100_000, 2_000, 500, 8

Json = dict[str, Any]


def read_run(texts: Mapping[str, str]) -> Json:
    """Return the parts of a run: as they are described, otherwise as the spec has them."""
    found: Json = {"spec": "", "parts": [], "from": SPEC}
    wrong = []
    for tag, read in ((STACK, read_stack), (SPEC, read_spec)):
        if tag in texts:
            try:
                found = read(texts[tag])
                break
            except ValueError as error:
                wrong.append(str(error))
    return {**found, "error": "; ".join(wrong)}


def introduced(texts: Mapping[str, str]) -> Json:
    """Return the kind of a run, and its stack as one line, from its texts."""
    spec = texts.get(SPEC, "")
    if STACK in texts:
        with contextlib.suppress(ValueError):  # it is shown with the run itself
            spec = read_stack(texts[STACK])["spec"] or spec
    has = {"comparison": VERDICTS in texts, "stack": STACK in texts or SPEC in texts}
    return {"kinds": [kind for kind, there in has.items() if there], "spec": _one_line(spec)[:LONGEST_VALUE]}


def read_stack(text: str) -> Json:
    """Return what a `metaopt/stack` says, in the form that the page takes. Raises ValueError."""
    data = _json(text, STACK)
    branches = data.get("branches")
    parts = _parts(data.get("parts"), 0)
    if branches:  # at the top: those of the part that deals parameters out
        own = {"name": "partition", "kind": "optimizer", "branches": branches}
        parts.append(_part(own, 0))
    return {"spec": _one_line(_value(data.get("spec", ""))), "parts": parts, "from": STACK}


def _parts(given: Any, depth: int) -> list[Json]:
    if not isinstance(given, list) or not all(isinstance(part, dict) for part in given):
        raise ValueError(f"{STACK}: parts must be a list of objects")
    if depth > DEEPEST or len(given) > MOST:
        raise ValueError(f"{STACK}: at most {MOST} parts and {DEEPEST} branches inside one another are shown")
    return [_part(part, depth) for part in given]


def _part(given: Json, depth: int) -> Json:
    constants, scheduled, tags = (_dict(given.get(key)) for key in ("hyperparameters", "scheduled", "values"))
    name = _value(given.get("name", "?"))
    kind = _value(given.get("kind", ""))
    if kind == "optimizer":
        tags.setdefault("lr", RATE)
    written = given.get("given")
    rows = [
        {
            "name": key,
            "value": _value(constants[key]) if key in constants else "",
            "schedule": _value(scheduled[key]) if key in scheduled else "",
            "default": isinstance(written, list) and key not in written,
            "tag": tags[key] if isinstance(tags.get(key), str) else "",
        }
        for key in dict.fromkeys((*scheduled, *constants))
    ]
    measures = given.get("measures")
    branches = given.get("branches")
    if isinstance(branches, dict):
        branches = [{"pattern": pattern, "parts": parts} for pattern, parts in branches.items()]
    return {
        "name": name,
        "label": _value(given.get("label") or name),
        "kind": kind,
        "acts_on": _value(given.get("acts_on", "")),
        "hyperparameters": rows,
        "measures": [tag for tag in measures if isinstance(tag, str)] if isinstance(measures, list) else [],
        "branches": [
            {"pattern": _value(branch.get("pattern", "")), "parts": _parts(branch.get("parts"), depth + 1)}
            for branch in (branches if isinstance(branches, list) else [])
            if isinstance(branch, dict)
        ],
    }


def read_spec(text: str) -> Json:
    """Return what can be said of a run that has only its spec: nothing of it is executed. Raises ValueError."""
    line = _one_line(text)
    try:
        if len(line) > LONGEST_SPEC:
            raise ValueError
        tree = ast.parse(line, mode="eval").body
        parts = [_called(node) for node in _piped(tree)]
    except (SyntaxError, RecursionError, MemoryError, ValueError):
        raise ValueError(f"{SPEC} cannot be read as a spec") from None
    return {"spec": line, "parts": parts, "from": SPEC}


def _piped(tree: ast.expr) -> list[ast.expr]:
    """Return the parts of `a | b | c`."""
    found: list[ast.expr] = []
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr):
        found.append(tree.right)
        tree = tree.left
    return [tree, *reversed(found)]


def _called(node: ast.expr) -> Json:
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    given = {keyword.arg or "**": keyword.value for keyword in call.keywords}
    given.update({f"{number}": value for number, value in enumerate(call.args, 1)})
    name = ast.unparse(call.func)
    # a part that deals parameters out takes pipelines by pattern
    branches = [
        {"pattern": ast.unparse(key).strip("'\""), "parts": [_called(part) for part in _piped(value)]}
        for dealt in given.values()
        if isinstance(dealt, ast.Dict)
        for key, value in zip(dealt.keys, dealt.values, strict=True)
        if key is not None
    ]
    label = given.pop("label", None)
    texts = {key: ast.unparse(value) for key, value in given.items() if not isinstance(value, ast.Dict)}
    # the one hyperparameter whose tag is known without a description
    rate = {"lr": RATE} if "lr" in texts else {}
    shown = label.value if isinstance(label, ast.Constant) else name.rpartition(".")[2]
    own = {"name": name, "label": shown, "hyperparameters": texts, "values": rate}
    return {**_part(own, 0), "branches": branches}


def read_verdicts(text: str) -> Json:
    """Return what a `metaopt/verdicts` says, in the form that the page takes. Raises ValueError."""
    data = _json(text, VERDICTS)
    rows = data.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{VERDICTS}: rows must be a list of objects")
    if len(rows) > MOST:
        raise ValueError(f"{VERDICTS}: at most {MOST} rows are shown")
    words, numbers = ("contender", "verdict"), ("difference", "low", "high", "p")
    return {
        "baseline": _value(data.get("baseline", "")),
        "metric": _value(data.get("metric", "")),
        "level": _number(data.get("level")),
        "rows": [
            {**{key: _value(row.get(key, "")) for key in words}, **{key: _number(row.get(key)) for key in numbers}}
            for row in rows
        ],
    }


def _json(text: str, tag: str) -> Json:
    if len(text) > LONGEST:
        raise ValueError(f"{tag} has {len(text)} characters, at most {LONGEST} are read")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{tag} is not JSON") from None
    if not isinstance(data, dict):
        raise ValueError(f"{tag} must be a JSON object, got {type(data).__name__}")
    return data


def _one_line(text: str) -> str:
    """Return the first line that says something; Markdown's indentation of code goes."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _dict(value: Any) -> Json:
    return dict(list(value.items())[:MOST]) if isinstance(value, dict) else {}


def _value(value: Any) -> str:
    """Return a value as text, as a spec writes it; JSON has lists where a spec has tuples."""
    text = value if isinstance(value, str) else repr(tuple(value) if isinstance(value, list) else value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _number(value: Any) -> float | None:
    """Return a number, also one that is written as text (JSON has no infinity), or None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number
