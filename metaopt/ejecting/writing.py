"""A stack as one file without metaopt: the parts' own source, and as much of a small engine as they need."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any

import torch

import metaopt
from metaopt import errors
from metaopt.construction.building import build
from metaopt.construction.making import arrange
from metaopt.ejecting import template as ejected
from metaopt.ejecting.branches import MOVES, branches_of, check_inside, sample
from metaopt.ejecting.folding import folded
from metaopt.ejecting.makers import branching_maker, plain_maker, positional
from metaopt.ejecting.trying import try_out
from metaopt.errors import MetaoptError, SpecError
from metaopt.registry import registry
from metaopt.schedule import Schedule
from metaopt.specs.pipeline import Pipeline, as_pipeline
from metaopt.stack import Stack
from metaopt.wrapper import Wrapper

LONGEST = 300
# stands for the length of a run in a file for any length: a prime that no part has among its numbers
LENGTH = 7919317
# modules that the head of the file imports, or that an ejected file must not need
PRESENT = frozenset({"metaopt", "torch", "typing", "collections", "math", "__future__"})
DROPPED = frozenset(
    {"active_slots", "update_rules", "resets_base_state", "validate", "length", "__eq__", "__repr__", "__init__"}
)
HEAD = '''"""{spec}

Written by `metaopt eject` (metaopt {version}): the same optimizer without metaopt. Call `make_optimizer(params)` with
{given}. On one device it trains as the stack did, bit for bit.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Callable, Literal

import torch

'''


def eject(spec: Any, total_steps: int | None = None) -> str:
    """Return a Python file that trains as the stack does, bit for bit, and does not import metaopt.

    For stacks of metaopt's own parts over torch's own bases: one, or those of a partition. The file is run and compared
    with the stack before it is returned. Raises SpecError for what it cannot do.
    """
    whole = as_pipeline(spec)
    # what only looks changes nothing
    watching = [part for part in whole if part.kind == "wrapper" and part.target.observes]
    pipeline = Pipeline(tuple(part for part in whole if part not in watching))
    branches = branches_of(pipeline)
    for each in (pipeline, *branches.values()):
        _check(each)
    _, outer = arrange(pipeline)
    inner = {pattern: arrange(branch)[1] for pattern, branch in branches.items()}
    check_inside(inner, outer)
    wrappers = (*(w for own in inner.values() for w in own), *outer)
    stack = small_stack(pipeline, total_steps)
    every = [part for each in (pipeline, *branches.values()) for part in each]
    schedules = [v for part in every for v in part.arguments.values() if isinstance(v, Schedule)]
    kinds = {type(w): _known([other for other in wrappers if type(other) is type(w)]) for w in wrappers}
    kinds |= {kind: {} for kind in _kinds(schedules)}
    code = {kind: _class_source(kind, known) for kind, known in kinds.items()}
    helpers = [helper for kind, source in code.items() for helper in _helpers(kind, source)]
    own = "\n".join(dict.fromkeys([*helpers, *code.values()]))
    maker = (
        branching_maker(branches, stack, inner, outer, own) if branches else plain_maker(pipeline, stack, outer, own)
    )
    made = "\n\n".join(filter(None, [_engine(wrappers, bool(schedules), own, maker), own, maker]))
    _check_names(own, wrappers)
    given = "`model.named_parameters()`" if branches else "parameters or torch's group dicts"
    head = HEAD.format(spec=whole, version=metaopt.__version__, given=given)
    if watching:
        left_out = ", ".join(part.label or part.name for part in watching)
        told = '"""Return the optimizer."""'
        made = made.replace(told, f"{told}\n    # left out, because it only looks: {left_out}", 1)
    text = _tidy(head + made)
    if (length := text.count("\n")) > LONGEST:
        raise SpecError(f"eject: the file would have {length} lines, at most {LONGEST} are readable: use fewer parts")
    try_out(text, pipeline, total_steps, branches)
    return text


def small_stack(spec: Any, total_steps: int | None = LENGTH) -> Stack:
    """Return the stack over a few small parameters, some for each base. Raises SpecError."""
    pipeline = as_pipeline(spec)
    return build(sample(branches_of(pipeline), str(pipeline)), pipeline, total_steps=total_steps)


def eject_for_any_length(spec: Any, command: str) -> str:
    """Return what `eject` does, with `make_optimizer(params, total_steps)`: the length of the run is given there."""
    text = eject(spec, LENGTH)
    text = re.sub(rf"\b{LENGTH}\b", "total_steps", text)
    text = text.replace("def make_optimizer(params: Any)", "def make_optimizer(params: Any, total_steps: int)")
    text = text.replace("`make_optimizer(params)`", "`make_optimizer(params, total_steps)`", 1)
    return text.replace("Written by `metaopt eject`", f"Written by `metaopt {command}`", 1)


def _check(pipeline: Pipeline) -> None:
    for own in pipeline:
        entry = next((entry for entry in registry.entries() if entry.target is own.target), None)
        if entry is None or entry.origin != "metaopt":
            raise SpecError(f"eject: {own.name} is not a part of metaopt's own; only those can be written down")
        if own.is_sequence:
            raise SpecError(f"eject: {own.name} changes its base in mid-run; eject each of its stages by itself")
        if own.kind != "wrapper":
            continue
        wrapper = own.build_wrapper()
        slots = wrapper.active_slots().values()
        kept = {slot.kind for slot in slots} - {"anchor", "start", "zeros", "previous"}
        reasons = {
            "evaluates the loss itself": "around" in wrapper.implemented_hooks(),
            "resets the base's state": wrapper.resets_base_state(),
            "keeps numbers of its own": bool(wrapper.scalars),
            "keeps more than copies of the weights": bool(kept) or any(s.copies or s.early for s in slots),
            "keeps copies on another device": any(s.device and getattr(wrapper, s.device, None) for s in slots),
            "adapts the base": wrapper.adapt_base(torch.optim.SGD) is not torch.optim.SGD,
        }
        for reason, holds in reasons.items():
            if holds:
                raise SpecError(f"eject: {wrapper.label} {reason}, which an ejected file does not do")


def _check_names(parts: str, wrappers: tuple[Wrapper, ...]) -> None:
    """Refuse parts that ask groups for what the engine of an ejected file does not have."""
    known = {name for kind in (ejected.Group, ejected.Groups) for name in dir(kind)} | {"params", "updates"}
    for wrapper in wrappers:
        known |= {*wrapper.hyperparameters, *wrapper.slots, *wrapper.counters}
    for node in ast.walk(ast.parse(parts)):
        of_groups = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if of_groups and node.value.id in ("group", "groups") and node.attr not in known:  # type: ignore[attr-defined]
            needed = node.attr  # type: ignore[attr-defined]
            raise SpecError(f"eject: a part needs {needed}, which an ejected file does not have")


def _kinds(schedules: Iterable[Any]) -> list[type]:
    """Return the classes of schedules and of those inside them, each once."""
    found: list[type] = []
    for schedule in schedules:
        inner = [v for v in (*schedule.given.values(), *positional(schedule)) if isinstance(v, Schedule)]
        found += [*_kinds(inner), type(schedule)]
    return list(dict.fromkeys(found))


# ---- source of parts


def _known(wrappers: list[Wrapper]) -> dict[str, Any]:
    """Return the settings that choose between branches and are the same in all wrappers of a class."""
    found: dict[str, Any] = {"is_logged": False, "has_logger": False}
    for name in wrappers[0].hyperparameters:
        values = {getattr(wrapper, name) for wrapper in wrappers}
        if len(values) == 1 and isinstance(value := values.pop(), str | bool | None):
            found[name] = value
    return found


def _class_source(kind: type, known: Mapping[str, Any]) -> str:
    """Return a class without its declarations, whose values come with the object, and without dead branches."""
    source = textwrap.dedent(inspect.getsource(kind))
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.ClassDef)
    wrapper: Any = kind if issubclass(kind, Wrapper) else None
    body = [f'    """{(inspect.getdoc(kind) or "").splitlines()[0]}"""']
    body += ["    acts_on_frozen = True"] if wrapper and wrapper.acts_on_frozen else []
    body += [f"    {name} = 0" for name in (wrapper.counters if wrapper else ())]
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name not in DROPPED:
            first = min([member.lineno, *(d.lineno for d in member.decorator_list)])
            own = textwrap.dedent("\n".join(source.splitlines()[first - 1 : member.end_lineno]))
            body.append(textwrap.indent(folded(member, known) or own, "    "))
    return f"class {kind.__name__}({'Part' if wrapper else 'Schedule'}):\n" + "\n\n".join(body)


def _helpers(kind: type, source: str) -> Iterator[str]:
    """Yield the imports, functions, constants and errors that the source of a class uses from its module."""
    module = inspect.getsource(import_module(kind.__module__))
    body = ast.parse(module).body
    defined = {name: node for node in body for name in defined_names(node)}
    wanted, seen = _used(source), set[str]()
    found: list[ast.stmt] = []
    while wanted - seen:
        name = min(wanted - seen)
        seen.add(name)
        node = defined.get(name)
        if node is not None and name != kind.__name__ and not isinstance(node, ast.ClassDef):
            found.append(node)
            wanted |= _used(ast.unparse(node))
        elif isinstance(error := vars(errors).get(name), type) and issubclass(error, MetaoptError):
            yield f"class {name}(RuntimeError):\n    pass"
    for line in [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]:
        origin = getattr(line, "module", None) or line.names[0].name
        if origin.split(".")[0] not in PRESENT and seen & {a.asname or a.name for a in line.names}:
            yield ast.unparse(line)
    for node in sorted(found, key=lambda node: node.lineno):
        yield ast.get_source_segment(module, node) or ""


def defined_names(node: ast.stmt) -> list[str]:
    """Return the names that a statement of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _used(code: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(textwrap.dedent(code))) if isinstance(node, ast.Name)}


# ---- the engine


def _engine(wrappers: tuple[Wrapper, ...], scheduled: bool, parts: str, maker: str) -> str:
    """Return as much of the engine as these parts need."""
    hooks = set().union(*(w.implemented_hooks() for w in wrappers))
    kinds = {slot.kind for w in wrappers for slot in w.active_slots().values()}
    features = {
        "slots": bool(kinds - {"previous"}),
        "on_gradients": "on_gradients" in hooks,
        "before_update": "before_update" in hooks,
        "on_update": bool(hooks & {"on_update", "after_updates"}),
        "weights": bool(hooks & {"on_update", "after_updates"}) or "previous" in kinds,
        "previous": "previous" in kinds,
        "skips": any(w.may_skip_updates for w in wrappers),
        "iterates": re.search(r"\bin groups\b|norm_of", parts) is not None,
        "scales": ".scale(" in parts,
        "stacks": "group.stack(" in parts,  # torch.stack keeps no method
        # of parts that others behind them may move
        "anchors": any(s.kind == "anchor" for w in wrappers[:-1] for s in w.active_slots().values()),
        "schedules": scheduled,
        "branches": "Branches(" in maker,
        "single": "Branches(" not in maker,
        "acts_behind": bool(hooks & MOVES),
        "averaged": "averaged" in hooks,
    }
    source = inspect.getsource(import_module("metaopt.ejecting.template"))
    source = source[source.index("Tensors = ") :]
    for name, wanted in features.items():
        if not wanted:
            source = re.sub(rf"^ *# <{name}>\n.*?^ *# </{name}>\n", "", source, flags=re.M | re.S)
    source = re.sub(r"^ *# </?\w+>\n", "", source, flags=re.M)
    return _reachable(source, f"{parts}\n{maker}")


def _reachable(source: str, parts: str) -> str:
    """Drop the methods, functions and classes of a source that nothing uses."""
    while True:
        lines, tree = source.splitlines(), ast.parse(source)
        whole = ast.parse(parts + "\n" + source)
        nodes = [*ast.walk(whole)]
        attributes = set(_used_outside_itself(whole, ast.Attribute)) | {"step", "load_state_dict", "averaged"}
        names = set(_used_outside_itself(whole, ast.Name)) | {"Stack"}
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        methods = [n for node in classes for n in node.body if isinstance(n, ast.FunctionDef)]
        unused: list[Any] = [n for n in methods if n.name not in attributes and not n.name.startswith("__")]
        unused += [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name not in names]
        unused += [n for n in tree.body if isinstance(n, ast.Assign) and not names & _assigned_twice(n, nodes)]
        if not unused:
            return source
        dropped: set[int] = set()
        for node in unused:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            dropped |= {*range(first, node.end_lineno + 1)}
        source = "\n".join(line for number, line in enumerate(lines, 1) if number not in dropped) + "\n"


def _used_outside_itself(node: ast.AST, kind: type, inside: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the names that something uses; what a function uses of its own name does not count."""
    if isinstance(node, ast.FunctionDef):
        inside = (*inside, node.name)
    name = getattr(node, "id", getattr(node, "attr", "")) if isinstance(node, kind) else ""
    if name and name not in inside:
        yield name
    for child in ast.iter_child_nodes(node):
        yield from _used_outside_itself(child, kind, inside)


def _assigned_twice(node: ast.Assign, nodes: list[ast.AST]) -> set[str]:
    """Return the names of an assignment that something reads."""
    read = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    return read & set(defined_names(node))


def _tidy(text: str) -> str:
    """Remove comments for type checkers, imports that nothing uses, and surplus empty lines."""
    text = re.sub(r"  # (type: ignore|noqa)[^\n]*", "", text)
    text = re.sub(r"(?<![\w.])Tensor\b", "torch.Tensor", text)
    for name, line in (
        ("contextmanager", "from contextlib import contextmanager\n"),
        ("fnmatchcase", "from fnmatch import fnmatchcase\n"),
        ("math", "import math\n"),
        ("Callable", "Callable, "),
        ("Literal", ", Literal"),
    ):
        if len(re.findall(rf"\b{name}\b", text.replace(line, "", 1))) == 0:
            text = text.replace(line, "", 1)
    for line in dict.fromkeys(re.findall(r"^(?:from|import) \w[^\n]*\n", text.split("import torch\n", 1)[1], re.M)):
        text = text.replace(line, "").replace("from typing import", f"{line}from typing import", 1)
    text = re.sub(r"\n+(?=(?:class|def|@\w+\ndef) )", "\n\n\n", text)
    text = re.sub(r"\n{3,}(?= )", "\n\n", text)
    return re.sub(r"\n{4,}", "\n\n\n", text).rstrip("\n") + "\n"
