"""Text <-> stack: parts, pipelines of parts, and the one line of text that both can be written as."""

import ast
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from dataclasses import replace as changed
from typing import Any

import torch

from metaopt import wrapper as wrapper_module
from metaopt.dividing import Division
from metaopt.errors import MetaoptError, SpecError
from metaopt.hyperparameters import Hyperparameter, bind, from_signature
from metaopt.registry import Entry, registry
from metaopt.schedule import Schedule
from metaopt.wrapper import Wrapper, check_value

LONGEST = 64 * 1024
DEEPEST = 200


@dataclass(frozen=True)
class Part:
    """One part of a pipeline: a registered (or given) class with the arguments that it will get. Knows `|`."""

    kind: str
    name: str
    target: Any
    given: Mapping[str, Any] = field(default_factory=dict)
    label: str | None = None
    registered: bool = True

    @property
    def hyperparameters(self) -> dict[str, Hyperparameter]:
        """What the part can be given, by name."""
        own = getattr(self.target, "hyperparameters", None)
        # an optimizer's first argument are the parameters
        takes_parameters = self.kind == "optimizer" and not self.divides
        return dict(own) if isinstance(own, Mapping) else from_signature(self.target, skip_first=takes_parameters)

    @property
    def divides(self) -> bool:
        """Whether the part deals the parameters out to pipelines of its own."""
        return isinstance(self.target, type) and issubclass(self.target, Division)

    def __call__(self, *args: Any, label: str | None = None, **kwargs: Any) -> Any:
        """Return the part with these hyperparameters; a schedule, logger or problem is made at once."""
        if self.kind in ("schedule", "logger", "problem"):
            if label is not None:
                raise SpecError(f"{self.name}: a {self.kind} takes no label")
            return self.target(*args, **kwargs)
        if label is not None and self.kind == "optimizer":
            raise SpecError(f"{self.name}: the base takes no label: its entries keep their bare names")
        given = dict(self.given)
        given.update(bind(self.hyperparameters, self.name, args, kwargs))
        for name, value in given.items():
            given[name] = check_value(self.hyperparameters[name], value, self.name)
        if self.divides and isinstance(given.get("parts"), Mapping):
            given["parts"] = {str(part): as_pipeline(pipeline) for part, pipeline in given["parts"].items()}
        return changed(self, given=given, label=label or self.label)

    def make(self) -> Wrapper:
        """Return the wrapper object of a wrapper part."""
        made: Wrapper = self.target(label=self.label or self.name.rpartition(".")[2], **self.given)
        return made

    def __or__(self, other: Any) -> "Pipeline":
        return Pipeline((*as_pipeline(self).parts, *as_pipeline(other).parts))

    def __ror__(self, other: Any) -> "Pipeline":
        return Pipeline((*as_pipeline(other).parts, *as_pipeline(self).parts))

    def __hash__(self) -> int:
        return hash((self.kind, self.name, repr(self.given), self.label))

    def __str__(self) -> str:
        if not self.registered:
            raise SpecError(f"{self.name} is not registered and has no text: register it with metaopt.register")
        shown = []
        for name, value in self.given.items():
            default = self.hyperparameters[name].default
            # 0 == 0.0 == False: a default is left out only where it is of the same type
            if type(value) is type(default) and not isinstance(value, torch.Tensor) and value == default:
                continue
            if self.divides and name == "parts":
                shown.append("{" + ", ".join(f"{part!r}: {pipeline}" for part, pipeline in value.items()) + "}")
                continue
            shown.append(f"{name}={to_text(value, f'{self.name}: {name}')}")
        if self.label is not None and self.label != self.name.rpartition(".")[2]:
            shown.append(f"label={self.label!r}")
        return f"{self.name}({', '.join(shown)})" if shown else self.name

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.given.items())
        return f"{self.name}({arguments})"


@dataclass(frozen=True)
class Pipeline:
    """Parts in the order in which the data flows: closure, gradients, update, parameters."""

    parts: tuple[Part, ...]

    def __or__(self, other: Any) -> "Pipeline":
        return Pipeline((*self.parts, *as_pipeline(other).parts))

    def __ror__(self, other: Any) -> "Pipeline":
        return Pipeline((*as_pipeline(other).parts, *self.parts))

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __str__(self) -> str:
        return " | ".join(str(part) for part in self.parts)

    def __repr__(self) -> str:
        return " | ".join(repr(part) for part in self.parts)


def part(name: str, kind: str | None = None) -> Part:
    """Return the registered part of this name. Raises UnknownPart."""
    return _from_entry(registry.find(name, kind))


def _from_entry(entry: Entry) -> Part:
    return Part(entry.kind, entry.name, entry.target)


def as_pipeline(parts: Any) -> Pipeline:
    """Return the pipeline that a text, a part, a wrapper, an optimizer class or a list of these means."""
    if isinstance(parts, Pipeline):
        return parts
    if isinstance(parts, str):
        return parse(parts)
    if isinstance(parts, Part):
        if parts.kind not in ("optimizer", "wrapper"):
            raise SpecError(f"{parts.name} is a {parts.kind}: a pipeline is made of wrappers and an optimizer")
        return Pipeline((parts,))
    if isinstance(parts, Wrapper):
        name = registry.name_of(type(parts))
        own = type(parts).__name__
        default = (name or own.lower()).rpartition(".")[2]
        label = default if parts.label == own.lower() else parts.label
        return Pipeline((Part("wrapper", name or own, type(parts), parts.given, label, name is not None),))
    if isinstance(parts, type) and issubclass(parts, torch.optim.Optimizer):
        name = registry.name_of(parts)
        return Pipeline((Part("optimizer", name or parts.__name__, parts, registered=name is not None),))
    if isinstance(parts, type) and issubclass(parts, Wrapper):
        return as_pipeline(parts())
    if isinstance(parts, list | tuple):
        return Pipeline(tuple(p for item in parts for p in as_pipeline(item).parts))
    raise SpecError(f"{parts!r:.80} is no part: give text, metaopt's parts, a Wrapper or an optimizer class")


def parse(text: str) -> Pipeline:
    """Read a pipeline from text; nothing in it is evaluated. Raises SpecError, UnknownPart, HyperparameterError."""
    try:
        return _pipeline(_tree(text), text)
    except RecursionError:
        raise SpecError("the spec is nested too deeply") from None


def _tree(text: str) -> ast.expr:
    if len(text.encode(errors="surrogatepass")) > LONGEST:
        raise SpecError(f"the spec is longer than {LONGEST // 1024} KiB")
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if deepest > DEEPEST:
        raise SpecError(f"the spec's brackets are {deepest} deep; at most {DEEPEST} are allowed")
    # python's own parser recurses for chains of operators too, and aborts on very long ones
    if text.count("|") > DEEPEST or text.count("-") > LONGEST // 64:
        raise SpecError(f"the spec has more than {DEEPEST} parts")
    if not text.strip():
        raise SpecError("the spec is empty; write for instance: clip_grad_norm(1.0) | adamw(lr=3e-4) | lookahead(k=5)")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, OverflowError) as error:
        column = getattr(error, "offset", None)
        at = f" at column {column}" if column else ""
        raise SpecError(f"the spec {text.strip()!r:.120} cannot be read{at}: {getattr(error, 'msg', error)}") from None


def _refuse(node: ast.AST, text: str) -> SpecError:
    source = ast.get_source_segment(text.strip(), node) or type(node).__name__
    column = getattr(node, "col_offset", 0) + 1
    return SpecError(
        f"the spec does not allow {source!r:.60} (column {column}): a pipeline is names, calls, literals, "
        f"tuples, lists, schedules and `|`"
    )


def _pipeline(node: ast.expr, text: str) -> Pipeline:
    parts: list[Part] = []
    for member in _piped(node):
        value = _value(member, text)
        if not isinstance(value, Part):
            raise _refuse(member, text)
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


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Constant):
        if node.value is None or isinstance(node.value, bool | int | float | str):
            return node.value
    elif isinstance(node, ast.Name):
        return math.inf if node.id == "inf" else part(node.id)
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return part(f"{node.value.id}.{node.attr}")
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        number = _value(node.operand, text)
        if isinstance(number, int | float) and not isinstance(number, bool):
            return -number
    elif isinstance(node, ast.Tuple):
        return tuple(_value(item, text) for item in node.elts)
    elif isinstance(node, ast.List):
        return [_value(item, text) for item in node.elts]
    elif isinstance(node, ast.Call):
        return _called(node, text)
    raise _refuse(node, text)


def _called(node: ast.Call, text: str) -> Any:
    called = _value(node.func, text) if isinstance(node.func, ast.Name | ast.Attribute) else None
    if not isinstance(called, Part) or called.kind in ("logger", "problem"):
        raise _refuse(node.func, text)
    if any(keyword.arg is None for keyword in node.keywords):
        raise _refuse(node, text)
    read = _value_or_parts if called.divides else _value
    args = [read(item, text) for item in node.args]
    kwargs = {str(keyword.arg): read(keyword.value, text) for keyword in node.keywords}
    for value in (*args, *kwargs.values()):
        if isinstance(value, Part):
            raise SpecError(
                f"{called.name}: {value.name} is a {value.kind} and no value; a schedule needs its brackets"
            )
    try:
        return called(*args, **kwargs)
    except MetaoptError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        raise SpecError(f"{called.name}: {error}") from error


def _value_or_parts(node: ast.expr, text: str) -> Any:
    """Read the dict of pipelines that a dividing part takes; anywhere else a dict is refused."""
    if not isinstance(node, ast.Dict):
        return _value(node, text)
    parts = {}
    for key, pipeline in zip(node.keys, node.values, strict=True):
        if not isinstance(key, ast.Constant) or not isinstance(key.value, str):
            raise _refuse(node if key is None else key, text)
        if key.value in parts:
            raise SpecError(f"the part {key.value!r} is given twice (column {key.col_offset + 1})")
        parts[key.value] = _pipeline(pipeline, text)
    return parts


def to_text(value: Any, where: str) -> str:
    """Return a value as spec text. Raises SpecError, naming `where`, for what has no text."""
    if isinstance(value, Schedule):
        return _schedule_text(value, where)
    if isinstance(value, bool | int | str) or value is None:
        return repr(value)
    if isinstance(value, float):
        if math.isnan(value):
            raise SpecError(f"{where}: nan has no text")
        return repr(value)
    if isinstance(value, tuple):
        inner = ", ".join(to_text(item, where) for item in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, list):
        return f"[{', '.join(to_text(item, where) for item in value)}]"
    raise SpecError(f"{where}: {type(value).__name__} is no literal and has no text")


def _schedule_text(schedule: Schedule, where: str) -> str:
    name = registry.name_of(type(schedule))
    if name is None:
        raise SpecError(f"{where}: {type(schedule).__name__} is not registered and has no text")
    positional = getattr(schedule, "positional", None)
    if positional is not None:
        return f"{name}({', '.join(to_text(value, where) for value in positional)})"
    arguments = ", ".join(f"{key}={to_text(value, where)}" for key, value in schedule.given.items())
    return f"{name}({arguments})"


wrapper_module.compose = lambda left, right: as_pipeline(left) | right
