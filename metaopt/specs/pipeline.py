"""Text <-> stack: parts, pipelines of parts, and the one line of text that both can be written as."""

import ast
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from inspect import isroutine
from typing import Any, ClassVar

import torch

from metaopt import wrapper as wrapper_module
from metaopt.deferred import Deferred
from metaopt.engine.multi_base import Partitioner, Sequencer
from metaopt.errors import HyperparameterError, MetaoptError, SpecError, with_article
from metaopt.hyperparameters import Hyperparameter, bind, from_signature, plain
from metaopt.registry import Entry, registry
from metaopt.schedule import FunctionSchedule, Schedule, TupleSchedule, validate_value
from metaopt.space import Space, validate_ends
from metaopt.specs.kinds import check_kind
from metaopt.specs.syntax import Source
from metaopt.wrapper import Wrapper


class _Signature:
    """The signature of a part: what an interactive shell completes and shows."""

    def __get__(self, own: Any, kind: type) -> inspect.Signature:
        if own is None:
            raise AttributeError("__signature__")
        found: list[inspect.Parameter] = []
        for h in own.hyperparameters.values():
            # python has no required argument behind one that may be left out; the default is then called "required"
            behind = any(other.default is not inspect.Parameter.empty for other in found)
            default = inspect.Parameter.empty if h.required and not behind else h.default
            annotation = inspect.Parameter.empty if h.type is None else h.type
            known = inspect.Parameter.POSITIONAL_OR_KEYWORD
            found.append(inspect.Parameter(h.name, known, default=default, annotation=annotation))
        if own.kind == "wrapper":
            label = inspect.Parameter("label", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=str | None)
            found.append(label)
        return inspect.Signature(found)


@dataclass(frozen=True)
class Part:
    """One part of a pipeline: a registered (or given) class with the arguments that it will get. Knows `|`."""

    kind: str
    name: str
    target: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)
    label: str | None = None
    registered: bool = True
    __signature__: ClassVar[_Signature] = _Signature()

    def __post_init__(self) -> None:
        object.__setattr__(self, "__doc__", inspect.getdoc(self.target))  # of the part, for help() and editors

    @property
    def hyperparameters(self) -> dict[str, Hyperparameter]:
        """What the part can be given, by name."""
        own = getattr(self.target, "hyperparameters", None)
        # an optimizer's first argument are the parameters
        if self.is_sequence:
            return {"members": Hyperparameter("members", doc="bases, with the length of each but the last behind it")}
        takes_parameters = self.kind == "optimizer" and not self.is_partition
        return dict(own) if isinstance(own, Mapping) else from_signature(self.target, skip_first=takes_parameters)

    @property
    def is_partition(self) -> bool:
        """Whether the part deals the parameters out to pipelines of its own."""
        return isinstance(self.target, type) and issubclass(self.target, Partitioner)

    @property
    def is_sequence(self) -> bool:
        """Whether the part has several pipelines as the base, one after the other."""
        return isinstance(self.target, type) and issubclass(self.target, Sequencer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the part with these hyperparameters; a schedule, space, logger or problem is made at once."""
        label = kwargs.pop("label", None)
        if self.kind not in ("optimizer", "wrapper"):
            if label is not None:
                raise SpecError(f"{self.name}: a {self.kind} takes no label")
            return self.target(*map(plain, args), **{name: plain(value) for name, value in kwargs.items()})
        if label is not None and not isinstance(label, str):
            raise SpecError(f"{self.name}: label must be text, got {label!r:.60}")
        if label is not None and self.kind == "optimizer":
            raise SpecError(f"{self.name}: the base takes no label: its entries keep their bare names")
        self._refuse_optimizer_style(args)
        if self.is_sequence:
            return self._sequence(args, kwargs)
        given = dict(self.arguments)
        given.update(bind(self.hyperparameters, self.name, args, kwargs))
        for name, value in given.items():
            _refuse_parts(value, self.name)
            given[name] = validate_value(self.hyperparameters[name], value, self.name)
        if self.is_partition and isinstance(given.get("parts"), Mapping):
            given["parts"] = {str(part): as_pipeline(pipeline) for part, pipeline in given["parts"].items()}
        return changed(self, arguments=given, label=label or self.label)

    def _refuse_optimizer_style(self, args: tuple[Any, ...]) -> None:
        """Raise SpecError for what a class of torch's or a wrapping class of another library takes first."""
        first = args[0] if args else None
        own = f"{self.name}(...)"
        if isinstance(first, torch.optim.Optimizer):
            fix = f"metaopt.wrap(optimizer, {own})" if self.kind == "wrapper" else "metaopt.wrap(optimizer, parts)"
            raise SpecError(f"{own} describes a part and takes no optimizer: write {fix}")
        if isinstance(first, torch.nn.Module | torch.nn.Parameter | Iterator) and not self.is_partition:
            fix = own if self.kind == "optimizer" else f"adamw(lr=3e-4) | {own}"
            raise SpecError(f"{own} describes a part and takes no parameters: write metaopt.build(model, {fix})")

    def _sequence(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "Part":
        if kwargs:
            raise SpecError(f"{self.name} takes no names, only bases and numbers in order, got {', '.join(kwargs)}")
        members = tuple(m if isinstance(m, int | float | Space) else as_pipeline(m) for m in map(plain, args))
        sequencer = self.target(*members)
        for stage in sequencer.stages:
            if not isinstance(stage, Pipeline):
                raise SpecError(f"{self.name}: expected a base such as adamw(lr=1e-3), got {stage!r}")
        return changed(self, arguments={"members": members})

    def build_wrapper(self) -> Wrapper:
        """Return the wrapper object of a wrapper part."""
        made: Wrapper = self.target(label=self.label or self.name.rpartition(".")[2], **self.arguments)
        return made

    def __or__(self, other: Any) -> "Pipeline":
        return Pipeline((*as_pipeline(self).parts, *as_pipeline(other).parts))

    def __ror__(self, other: Any) -> "Pipeline":
        return Pipeline((*as_pipeline(other).parts, *as_pipeline(self).parts))

    def __hash__(self) -> int:
        return hash((self.kind, self.name, repr(self.arguments), self.label))

    def __str__(self) -> str:
        if not self.registered:
            raise SpecError(f"{self.name} is not registered and has no text: register it with metaopt.register")
        shown = []
        if self.is_sequence:
            members = (_member_text(member, self.name) for member in self.arguments.get("members", ()))
            return f"{self.name}({', '.join(members)})"
        for name, value in self.arguments.items():
            default = self.hyperparameters[name].default
            # 0 == 0.0 == False: a default is left out only where it is of the same type
            if type(value) is type(default) and not isinstance(value, torch.Tensor) and value == default:
                continue
            if self.is_partition and name == "parts":
                shown.append("{" + ", ".join(f"{part!r}: {pipeline}" for part, pipeline in value.items()) + "}")
                continue
            shown.append(f"{name}={to_text(value, f'{self.name}: {name}')}")
        if self.label is not None and self.label != self.name.rpartition(".")[2]:
            shown.append(f"label={self.label!r}")
        return f"{self.name}({', '.join(shown)})" if shown else self.name

    def __repr__(self) -> str:
        if self.is_sequence:
            return f"{self.name}({', '.join(map(repr, self.arguments.get('members', ())))})"
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
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
    check_kind(entry.kind, entry.name, entry.target, entry.origin)
    return Part(entry.kind, entry.name, entry.target)


def as_pipeline(parts: Any) -> Pipeline:
    """Return the pipeline that a text, a part, a wrapper, an optimizer class or a list of these means."""
    if isinstance(parts, Pipeline):
        return parts
    if isinstance(parts, str):
        return parse(parts)
    if isinstance(parts, Part):
        if parts.kind not in ("optimizer", "wrapper"):
            raise SpecError(
                f"{parts.name} is {with_article(parts.kind)}: a pipeline is made of wrappers and an optimizer"
            )
        return Pipeline((parts,))
    if isinstance(parts, Wrapper):
        name = registry.name_of(type(parts))
        own = type(parts).__name__
        default = (name or own.lower()).rpartition(".")[2]
        label = default if parts.label == own.lower() else parts.label
        return Pipeline((Part("wrapper", name or own, type(parts), parts.arguments, label, name is not None),))
    if isinstance(parts, type) and issubclass(parts, torch.optim.Optimizer):
        name = registry.name_of(parts)
        return Pipeline((Part("optimizer", name or parts.__name__, parts, registered=name is not None),))
    if isinstance(parts, type) and issubclass(parts, Wrapper):
        return as_pipeline(parts())
    if isinstance(parts, Mapping):
        from metaopt.specs.data import pipeline_of

        return pipeline_of(parts)
    if isinstance(parts, Sequence):
        return Pipeline(tuple(p for item in parts for p in as_pipeline(item).parts))
    if isinstance(parts, torch.optim.Optimizer):
        raise SpecError(
            f"{type(parts).__name__} is an optimizer that exists already: metaopt.wrap(optimizer, parts) puts parts "
            f"around it, build() takes its class"
        )
    if isinstance(parts, torch.nn.Module | torch.Tensor):
        raise SpecError(
            f"the spec must be text or parts, got {type(parts).__name__}: build(model, spec) takes the model first"
        )
    shown = " ".join(repr(parts).split())
    raise SpecError(f"expected text, metaopt's parts, a Wrapper or an optimizer class, got {shown:.80}")


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
        _refuse_parts(value, called.name)
    return value


def _refuse_parts(value: Any, where: str) -> None:
    """Raise SpecError for a part in the place of a value, which most likely lacks its brackets."""
    for member in value if isinstance(value, tuple | list) else (value,):
        if isinstance(member, Part):
            raise SpecError(
                f"{where}: a value must not be a part, got {with_article(member.kind)}, {member.name}; "
                f"a schedule or a space needs its brackets"
            )


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


def to_text(value: Any, where: str) -> str:
    """Return a value as spec text. Raises SpecError, naming `where`, for what has no text."""
    if isinstance(value, FunctionSchedule) or isroutine(value):
        raise SpecError(
            f"{where}: a Python function has no text and works only in Python; "
            f"for a spec, write it as a metaopt.Schedule and register that"
        )
    if isinstance(value, TupleSchedule):
        return to_text(value.members, where)
    if isinstance(value, Deferred):
        return _deferred_text(value, where)
    if isinstance(value, bool | int | str) or value is None:
        return repr(value)
    if isinstance(value, float):
        if math.isnan(value):
            raise SpecError(f"{where}: nan has no text")
        return repr(value)
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        # the shortest number that makes the same tensor
        shorter = (float(f"{value.item():.{digits}g}") for digits in range(1, 18))
        return repr(next(x for x in shorter if torch.equal(torch.full_like(value, x), value)))
    if isinstance(value, tuple):
        inner = ", ".join(to_text(item, where) for item in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, list):
        return f"[{', '.join(to_text(item, where) for item in value)}]"
    raise SpecError(
        f"{where}: only numbers, text, None, tuples and lists can be written as text, got {type(value).__name__}"
    )


def _member_text(member: Any, where: str) -> str:
    return str(member) if isinstance(member, Pipeline) else to_text(member, where)


def _deferred_text(value: Deferred, where: str) -> str:
    name = registry.name_of(type(value))
    if name is None:
        raise SpecError(f"{where}: {type(value).__name__} is not registered and has no text")
    if value.positional is not None:
        return f"{name}({', '.join(to_text(member, where) for member in value.positional)})"
    arguments = ", ".join(f"{key}={to_text(member, where)}" for key, member in value.given.items())
    return f"{name}({arguments})"


wrapper_module.compose = lambda left, right: as_pipeline(left) | right
