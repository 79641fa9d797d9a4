"""Parts with their arguments, pipelines of parts, and the one line of text that a pipeline is written as."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from typing import Any, ClassVar

import torch

from metaopt import wrapper as wrapper_module
from metaopt.engine.multi_base import Partitioner, Sequencer
from metaopt.errors import SpecError, with_article
from metaopt.hyperparameters import Hyperparameter, bind, from_signature, plain
from metaopt.registry import Entry, registry
from metaopt.schedule import validate_value
from metaopt.space import Space
from metaopt.specs.kinds import check_kind
from metaopt.specs.text import to_text
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
            refuse_parts(value, self.name)
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
        from metaopt.specs.parsing import parse  # which makes parts, so it stands above this

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


def refuse_parts(value: Any, where: str) -> None:
    """Raise SpecError for a part in the place of a value, which most likely lacks its brackets."""
    for member in value if isinstance(value, tuple | list) else (value,):
        if isinstance(member, Part):
            raise SpecError(
                f"{where}: a value must not be a part, got {with_article(member.kind)}, {member.name}; "
                f"a schedule or a space needs its brackets"
            )


def _member_text(member: Any, where: str) -> str:
    return str(member) if isinstance(member, Pipeline) else to_text(member, where)


wrapper_module.compose = lambda left, right: as_pipeline(left) | right
