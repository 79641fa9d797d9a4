"""The search spaces of a pipeline: which there are, and the pipeline with a value in the place of each."""

from collections.abc import Iterator, Mapping
from dataclasses import replace as changed
from typing import Any

from metaopt.errors import SpecError
from metaopt.space import Space, fill_spaces, find_spaces
from metaopt.specs.pipeline import Part, Pipeline
from metaopt.specs.text import to_text


def spaces_of(pipeline: Pipeline) -> dict[str, Space]:
    """Return the spaces of a pipeline by path: `lr`, `betas[0]`, `lr.schedule.start`, `lookahead.k`, `*bias: lr`.

    Hyperparameters of the base have bare names, as in parameter groups; those of a part of a partition have its
    pattern in front, those of a base in a sequence its position. Raises SpecError if two parts have one label.
    """
    found: dict[str, Space] = {}
    for path, space in _spaces(pipeline, ""):
        if path in found:
            raise SpecError(f"two parts have the hyperparameter {path}: give one of them a label=")
        found[path] = space
    return found


def with_values(pipeline: Pipeline, values: Mapping[str, Any]) -> Pipeline:
    """Return the pipeline with these values, by path, in the place of its spaces. Raises HyperparameterError."""
    return Pipeline(tuple(_filled(part, "", values) for part in pipeline))


def refuse_spaces(pipeline: Pipeline) -> None:
    """Raise SpecError for a pipeline that cannot be built yet, because values are still to be chosen."""
    for path, space in spaces_of(pipeline).items():
        raise SpecError(
            f"{path} must be a value to build a stack, got the search space {to_text(space, path)}: write a value, or "
            f"choose one with: metaopt tune SPEC --problem PROBLEM"
        )


def _spaces(pipeline: Pipeline, before: str) -> Iterator[tuple[str, Space]]:
    for part in pipeline:
        for path, value in _values(part, before):
            yield from _spaces(value, f"{path}: ") if isinstance(value, Pipeline) else find_spaces(value, path)


def _filled(part: Part, before: str, values: Mapping[str, Any]) -> Part:
    new = [
        Pipeline(tuple(_filled(own, f"{path}: ", values) for own in value))
        if isinstance(value, Pipeline)
        else fill_spaces(value, path, values)
        for path, value in _values(part, before)
    ]
    if part.is_sequence:
        filled: Part = part(*new)
        return filled
    bare = changed(part, arguments={})
    if part.is_partition and isinstance(part.arguments.get("parts"), Mapping):
        return bare(parts=dict(zip(part.arguments["parts"], new, strict=True)))  # type: ignore[no-any-return]
    return bare(**dict(zip(part.arguments, new, strict=True)))  # type: ignore[no-any-return]


def _values(part: Part, before: str) -> list[tuple[str, Any]]:
    """Return what may hold spaces in a part, in order, each with its path."""
    if part.is_sequence:
        return [(f"{before}{position}", member) for position, member in enumerate(part.arguments.get("members", ()))]
    parts = part.arguments.get("parts")
    if part.is_partition and isinstance(parts, Mapping):
        return [(f"{before}{pattern}", pipeline) for pattern, pipeline in parts.items()]
    called = "" if part.kind == "optimizer" else f"{part.label or part.name.rpartition('.')[2]}."
    return [(f"{before}{called}{name}", value) for name, value in part.arguments.items()]
