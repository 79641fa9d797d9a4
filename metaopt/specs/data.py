"""Specs as data: the lists and dicts that YAML, TOML and JSON give, with the same meaning as text."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from metaopt.errors import SpecError, did_you_mean
from metaopt.hyperparameters import Hyperparameter
from metaopt.specs.parsing import parse_value
from metaopt.specs.pipeline import Part, Pipeline, as_pipeline, part

# how other libraries name the class in a dict of its arguments
_NAME_KEYS = ("name", "type", "class_path", "_target_")


def pipeline_of(written: Mapping[Any, Any]) -> Pipeline:
    """Return the pipeline of a dict `{part: arguments, ...}`, in its order. Raises SpecError, HyperparameterError.

    Arguments are a dict by name, a list by position, one value, or None. A schedule is text, `"cosine(3e-4)"`, or a
    dict of its own, `{"cosine": {"start": 3e-4}}`; so is a search space, `{"log": [1e-4, 1e-1]}`. Text is read as a
    value where no text is wanted: YAML 1.1 takes `1e-3` for text.
    """
    try:
        return Pipeline(tuple(_part(name, arguments) for name, arguments in written.items()))
    except RecursionError:  # an anchor of YAML may hold itself
        raise SpecError("the spec is nested too deeply") from None


def with_hyperparameters(pipeline: Pipeline, given: Mapping[str, Any]) -> Pipeline:
    """Return a pipeline with more hyperparameters: `lr` of the base, `lookahead.k` of the part with that label.

    Those of a base made of several go to each that has such a one and leaves it open. Raises HyperparameterError for
    one that the pipeline gives already, with another value.
    """
    for key, value in given.items():
        label, _, name = key.rpartition(".")
        parts = [_with(p, label, name, value) for p in pipeline]
        if all(new is old for new, old in zip(parts, pipeline, strict=True)):
            raise SpecError(_no_such(key, pipeline))
        pipeline = Pipeline(tuple(parts))
    return pipeline


def value_of(written: Any, declared: Hyperparameter | None) -> Any:
    """Return what a value in a configuration means for a hyperparameter; None: nothing is known about it."""
    if isinstance(written, str):
        return written if _takes(str, declared) else parse_value(written)
    if isinstance(written, Mapping):
        return dict(written) if _takes(dict, declared) else _deferred(written, declared)
    if isinstance(written, Sequence):
        members = [value_of(member, None) for member in written]
        return tuple(members) if declared is not None and tuple in declared.alternatives() else members
    return written


def _takes(kind: type, declared: Hyperparameter | None) -> bool:
    if declared is None:
        return False
    known = (declared.default, *(declared.choices or ()))
    return kind in declared.alternatives() or any(isinstance(value, kind) for value in known)


def _part(name: Any, arguments: Any) -> Part:
    if name in _NAME_KEYS:
        raise SpecError(f"a part is written as {{name: arguments}}, such as {{'adamw': {{'lr': 3e-4}}}}, got {name!r}")
    found = part(str(name))
    if found.is_partition:
        if isinstance(arguments, Mapping) and [*arguments] == ["parts"]:
            arguments = arguments["parts"]
        if not isinstance(arguments, Mapping):
            raise SpecError(f"{name} takes a dict of pipelines by pattern, got {arguments!r:.60}")
        made: Part = found({str(pattern): as_pipeline(pipeline) for pattern, pipeline in arguments.items()})
        return made
    if found.is_sequence:
        if not isinstance(arguments, Sequence) or isinstance(arguments, str):
            raise SpecError(f"{name} takes a list of pipelines and numbers in turn, got {arguments!r:.60}")
        return found(*arguments)  # type: ignore[no-any-return]
    if found.kind not in ("optimizer", "wrapper"):
        as_pipeline(found)  # says what a pipeline is made of
    part_made: Part = _called(found, arguments)
    return part_made


def _deferred(written: Mapping[Any, Any], declared: Hyperparameter | None) -> Any:
    """Return the schedule or the search space that a dict with its name means, for this hyperparameter."""
    if len(written) != 1:
        raise SpecError(f"a schedule or a space is a dict with one key, its name, got {dict(written)!r:.60}")
    ((name, arguments),) = written.items()
    found = part(str(name))
    if found.kind == "space":
        return _space(found, arguments, declared)
    return _called(part(str(name), "schedule"), arguments)


def _space(found: Part, arguments: Any, declared: Hyperparameter | None) -> Any:
    """Return a space over values that are read as those of the hyperparameter itself: text is text for one of text."""
    if isinstance(arguments, Mapping):
        return found(**{str(name): value_of(value, declared) for name, value in arguments.items()})
    if not isinstance(arguments, Sequence) or isinstance(arguments, str):
        raise SpecError(f"{found.name} takes a list of values or a dict by name, got {arguments!r:.60}")
    return found(*(value_of(value, declared) for value in arguments))


def _called(found: Part, arguments: Any) -> Any:
    """Return a part with the arguments that a configuration gives it."""
    declared = found.hyperparameters
    if arguments is None:
        return found()
    if isinstance(arguments, Mapping):
        return found(**{str(name): _keyword(str(name), value, declared) for name, value in arguments.items()})
    several = isinstance(arguments, Sequence) and not isinstance(arguments, str)
    values = list(arguments) if several else [arguments]
    order = [*declared.values(), *[None] * len(values)]
    return found(*(value_of(value, h) for value, h in zip(values, order, strict=False)))


def _keyword(name: str, value: Any, declared: Mapping[str, Hyperparameter]) -> Any:
    return value if name == "label" else value_of(value, declared.get(name))


def _with(own: Part, label: str, name: str, value: Any) -> Part:
    if own.is_partition and isinstance(own.arguments.get("parts"), Mapping):
        parts = {
            pattern: Pipeline(tuple(_with_open(p, label, name, value) for p in pipeline))
            for pattern, pipeline in own.arguments["parts"].items()
        }
        if parts == own.arguments["parts"]:
            return own
        changed: Part = own(parts=parts)
        return changed
    called = "" if own.kind == "optimizer" else own.label or own.name.rpartition(".")[2]
    if called != label or name not in own.hyperparameters:
        return own
    meant = value_of(value, own.hyperparameters[name])
    made: Part = own(**{name: meant})
    if name in own.arguments and own.arguments[name] != made.arguments[name]:
        raise SpecError(
            f"{own.name}: {name} is given twice, as {own.arguments[name]!r:.60} in the spec and as {meant!r:.60} "
            f"beside it: leave one of the two out"
        )
    return made


def _with_open(own: Part, label: str, name: str, value: Any) -> Part:
    return own if name in own.arguments else _with(own, label, name, value)


def _no_such(key: str, pipeline: Pipeline) -> str:
    keys = [*_keys(pipeline)]
    if key in keys:  # only parts of a base made of several leave their own as they are
        return f"{key} is given twice: all parts of the base have one of their own; leave one of the two out"
    meant = [known for known in keys if known.rpartition(".")[2] == key]
    near = f" Did you mean {' or '.join(meant)}?" if meant else did_you_mean(key, keys)
    return f"no part of this stack has the hyperparameter {key!r}.{near}"


def _keys(pipeline: Pipeline) -> Iterator[str]:
    """Yield what hyperparameters can be called beside a pipeline."""
    for own in pipeline:
        if own.is_partition:
            for inner in own.arguments.get("parts", {}).values():
                yield from _keys(inner)
        else:
            prefix = "" if own.kind == "optimizer" else f"{own.label or own.name.rpartition('.')[2]}."
            yield from (f"{prefix}{name}" for name in own.hyperparameters)
