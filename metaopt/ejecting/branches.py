"""The pipelines of a partition, for a file that `metaopt eject` writes."""

import re
from collections.abc import Mapping

import torch

from metaopt.errors import SpecError
from metaopt.registry import registry
from metaopt.specs.pipeline import Pipeline
from metaopt.wrapper import Wrapper

# the second is large enough for another way to take norms
SHAPES = ((5, 4), (256, 256), (4,), ())
# muon multiplies matrices many times
SHAPES_OF_MUON = ((5, 4), (48, 32))
MOVES = {"after_update", "after_updates", "on_update"}


def branches_of(pipeline: Pipeline) -> dict[str, Pipeline]:
    """Return the pipelines of a partition by their patterns, without what only looks; none for any other base."""
    base = next((part for part in pipeline if part.kind == "optimizer"), None)
    if base is None or not base.is_partition:
        return {}
    if base.target is not registry.find("partition", "optimizer").target:
        raise SpecError(
            f"eject: {base.name} chooses parameters by rules of its own; only partition can be written down"
        )
    return {
        pattern: Pipeline(tuple(part for part in branch if part.kind != "wrapper" or not part.target.observes))
        for pattern, branch in base.arguments["parts"].items()
    }


def check_inside(inner: Mapping[str, tuple[Wrapper, ...]], outer: tuple[Wrapper, ...]) -> None:
    """Raise SpecError for wrappers whose effect reaches from one part of a partition, or from around it, to another."""
    moving = next((w.label for w in outer if w.implemented_hooks() & MOVES), None)
    for pattern, wrappers in inner.items():
        for wrapper in wrappers:
            if wrapper.may_skip_updates:
                raise SpecError(f"eject: {wrapper.label} skips updates of all parts: write it before the partition")
            kinds = {slot.kind for slot in wrapper.active_slots().values()}
            if moving is not None and "anchor" in kinds:
                raise SpecError(
                    f"eject: {moving} moves the weights that {wrapper.label} of {pattern!r} keeps: write both inside "
                    f"of the partition, or both behind it"
                )


def sample(branches: Mapping[str, Pipeline], text: str) -> list[tuple[str, torch.nn.Parameter]]:
    """Return named parameters for a trial of a pipeline: some that each pattern chooses, and no others.

    `text` is the pipeline as text. Raises SpecError.
    """
    if not branches:
        shapes = SHAPES_OF_MUON if "muon" in text else SHAPES
        return [(f"p{number}", torch.nn.Parameter(torch.ones(shape))) for number, shape in enumerate(shapes)]
    partitioner = registry.find("partition", "optimizer").target(branches)
    found: list[tuple[str, torch.nn.Parameter]] = []
    for number, (pattern, branch) in enumerate(branches.items()):
        shapes = SHAPES_OF_MUON if "muon" in str(branch) else SHAPES
        words = [term.strip() for term in pattern.split("&")]
        glob = next((word for word in words if word not in ("scalar", "vector", "matrix")), "*")
        named = {_name(glob, f"{number}.{position}"): shape for position, shape in enumerate(shapes)}
        made = [(name, torch.nn.Parameter(torch.ones(shape))) for name, shape in named.items()]
        chosen = [(name, p) for name, p in made if partitioner.branch_of(name, p) == pattern]
        if not chosen:
            raise SpecError(f"eject: no parameter was found that {pattern!r} chooses: is another pattern before it?")
        found += chosen
    return found


def _name(glob: str, number: str) -> str:
    """Return a name that a shell glob matches."""
    text = re.sub(r"\[!.[^]]*\]", "_", glob)
    return re.sub(r"\[(.)[^]]*\]", r"\1", text).replace("*", f"p{number}").replace("?", "p")
