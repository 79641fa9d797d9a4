"""From text to pipelines, schedules and values: what the syntax tree of a spec means; nothing in it is evaluated."""

import ast
import math
from typing import Any

from metaopt.errors import HyperparameterError, MetaoptError, SpecError, with_article
from metaopt.hyperparameters import bind
from metaopt.schedule import Schedule, validate_value
from metaopt.space import validate_ends
from metaopt.specs.pipeline import Part, Pipeline, as_pipeline, part, refuse_parts
from metaopt.specs.syntax import Source


def parse(text: str) -> Pipeline:
    """Read a pipeline from text; nothing in it is evaluated. Raises SpecError, UnknownPart, HyperparameterError.

    An error's notes hold the text with a caret under the fault, where it is one line.
    """
    source = Source(text)
    try:
        return _pipeline(source.tree(), source)
    except RecursionError:
        raise SpecError("the spec is nested too deeply") from None


def parse_schedule(text: str) -> Schedule:
    """Read one schedule, such as `warmup(cosine(0.1), 0.05)`. Raises SpecError, HyperparameterError."""
    source = Source(text)
    node = source.tree()
    value = _value(node, source)
    if not isinstance(value, Schedule):
        what = f"{value.name} is {with_article(value.kind)}" if isinstance(value, Part) else "it is none"
        raise source.refused(node, f"a schedule is wanted here, such as cosine(0.1), and {what}")
    return value


def parse_value(text: str) -> Any:
    """Read one value, such as `1e-3`, `(0.9, 0.99)` or a schedule. Raises SpecError, HyperparameterError."""
    source = Source(text)
    return _value(source.tree(), source)


def _pipeline(node: ast.expr, source: Source) -> Pipeline:
    parts: list[Part] = []
    for member in _piped(node):
        value = _value(member, source)
        if not isinstance(value, Part):
            raise source.refused(member)
        with source.pointing_at(member):
            parts.extend(as_pipeline(value).parts)
    return Pipeline(tuple(parts))


def _piped(node: ast.expr) -> list[ast.expr]:
    members: list[ast.expr] = []
    pending = [node]
    while pending:
        current = pending.pop()
        if isinstance(current, ast.BinOp) and isinstance(current.op, ast.BitOr):
            pending += [current.left, current.right]
        else:
            members.append(current)
    return members[::-1]


def _value(node: ast.expr, source: Source) -> Any:
    if isinstance(node, ast.Constant):
        if node.value is None or isinstance(node.value, bool | int | float | str):
            return node.value
    elif isinstance(node, ast.Name):
        with source.pointing_at(node):
            return math.inf if node.id == "inf" else part(node.id)
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        with source.pointing_at(node):
            return part(f"{node.value.id}.{node.attr}")
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        number = _value(node.operand, source)
        if isinstance(number, int | float) and not isinstance(number, bool):
            return -number
    elif isinstance(node, ast.Tuple):
        return tuple(_value(item, source) for item in node.elts)
    elif isinstance(node, ast.List):
        return [_value(item, source) for item in node.elts]
    elif isinstance(node, ast.Call):
        return _called(node, source)
    raise source.refused(node)


def _called(node: ast.Call, source: Source) -> Any:
    called = _value(node.func, source) if isinstance(node.func, ast.Name | ast.Attribute) else None
    if not isinstance(called, Part) or called.kind in ("logger", "problem"):
        raise source.refused(node.func)
    if any(keyword.arg is None for keyword in node.keywords):
        raise source.refused(node)
    args = [_argument(item, called, source) for item in node.args]
    kwargs = {}
    for keyword in node.keywords:
        if keyword.arg in kwargs:
            with source.pointing_at(keyword):
                raise HyperparameterError(f"{called.name}: {keyword.arg} is given twice")
        kwargs[str(keyword.arg)] = _argument(keyword.value, called, source)
        with source.pointing_at(keyword):
            _check_alone(called, str(keyword.arg), kwargs[str(keyword.arg)])
    with source.pointing_at(node):
        try:
            return called(*args, **kwargs)
        except MetaoptError:
            raise
        except (TypeError, ValueError, ArithmeticError) as error:
            raise SpecError(f"{called.name}: {error}") from error


def _argument(node: ast.expr, called: Part, source: Source) -> Any:
    if called.is_sequence:
        return _value_or_pipeline(node, source)
    value = (_value_or_parts if called.is_partition else _value)(node, source)
    with source.pointing_at(node):
        refuse_parts(value, called.name)
    return value


def _check_alone(called: Part, name: str, value: Any) -> None:
    """Raise for one keyword what the call would raise, so that the error points at the keyword."""
    known = called.hyperparameters
    if name in known and called.kind in ("schedule", "space"):  # a schedule of schedules says where it takes them
        validate_ends(known[name], value, called.name, lambda own, end: own.validate(end, where=called.name))
    elif name in known:
        validate_value(known[name], value, called.name)
    elif known and name != "label":
        bind(known, called.name, (), {name: value})


def _value_or_pipeline(node: ast.expr, source: Source) -> Any:
    """Read a pipeline or a number, which a part with several bases in turn takes."""
    if isinstance(node, ast.BinOp):
        return _pipeline(node, source)
    value = _value(node, source)
    return as_pipeline(value) if isinstance(value, Part) else value


def _value_or_parts(node: ast.expr, source: Source) -> Any:
    """Read the dict of pipelines that a dividing part takes; anywhere else a dict is refused."""
    if not isinstance(node, ast.Dict):
        return _value(node, source)
    parts = {}
    for key, pipeline in zip(node.keys, node.values, strict=True):
        if not isinstance(key, ast.Constant) or not isinstance(key.value, str):
            raise source.refused(node if key is None else key)
        if key.value in parts:
            raise source.refused(key, f"the part {key.value!r} is given twice")
        parts[key.value] = _pipeline(pipeline, source)
    return parts
