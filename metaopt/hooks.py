"""What a plugin can offer: each hook returns {name: class or factory}."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pluggy

PROJECT = "metaopt"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

# kind of part -> the hook that offers it
HOOKS = {
    "optimizer": "metaopt_optimizers",
    "wrapper": "metaopt_wrappers",
    "schedule": "metaopt_schedules",
    "space": "metaopt_spaces",
    "tuner": "metaopt_tuners",
    "logger": "metaopt_loggers",
    "problem": "metaopt_problems",
}
EXAMPLES = "metaopt_examples"
# offers no parts of stacks, but places where trials run
EXECUTORS = "metaopt_executors"
# offers no parts, but lists of problems
SUITES = "metaopt_suites"


@dataclass(frozen=True)
class Example:
    """What the class of a part does not tell: how `metaopt check` makes and feeds it, and words for `metaopt show`.

    `spec` is the part as text, such as `muon(lr=0.01)`; without it the defaults serve. `bases` are those that a
    wrapper is checked with. `gradients="graph"` calls `backward(create_graph=True)`. `reference` is the rule on plain
    tensors (see `metaopt.testing.references`). `expected_failures` maps a check that cannot hold to the reason: it is
    still run, and an entry that is no longer needed is an error. `skip_reason` says why nothing can be checked here.
    `tolerance` is for a part whose own runs part in the last digits, as those through small matrix products may.
    `note` and `known_as`, what others call it, are for a class that is offered unchanged; those of metaopt say both
    themselves.
    """

    spec: str = ""
    bases: tuple[str, ...] = ()
    parameters: Literal["any", "matrices"] = "any"
    gradients: Literal["dense", "sparse", "graph"] = "dense"
    closure: bool = False
    reference: Callable[..., Any] | None = None
    expected_failures: Mapping[str, str] = field(default_factory=dict)
    skip_reason: str = ""
    tolerance: float = 0.0
    note: str = ""
    known_as: tuple[str, ...] = ()


@hookspec
def metaopt_optimizers() -> dict[str, Any]:  # type: ignore[empty-body]
    """Offer base optimizers: subclasses of torch.optim.Optimizer, unchanged, or factories of them."""


@hookspec
def metaopt_wrappers() -> dict[str, Any]:  # type: ignore[empty-body]
    """Offer wrappers: subclasses of metaopt.Wrapper."""


@hookspec
def metaopt_schedules() -> dict[str, Any]:  # type: ignore[empty-body]
    """Offer schedules: subclasses of metaopt.Schedule."""


@hookspec
def metaopt_spaces() -> dict[str, Any]:  # type: ignore[empty-body]
    """Offer search spaces: subclasses of metaopt.Space."""


@hookspec
def metaopt_tuners() -> dict[str, Any]:  # type: ignore[empty-body]
    """Offer ways to choose values for spaces: subclasses of metaopt.Tuner."""


@hookspec
def metaopt_loggers() -> dict[str, Any]:  # type: ignore[empty-body]
    """Offer loggers: subclasses of metaopt.Logger."""


@hookspec
def metaopt_problems() -> dict[str, Any]:  # type: ignore[empty-body]
    """Offer problems: subclasses of metaopt.Problem."""


@hookspec
def metaopt_examples() -> dict[str, Example | Sequence[Example]]:  # type: ignore[empty-body]
    """Say of parts what their classes do not: one example or several for each name."""


@hookspec
def metaopt_executors() -> dict[str, Any]:  # type: ignore[empty-body]
    """Offer places where the trials of a comparison run: subclasses of metaopt.lab.executors.Executor."""


@hookspec
def metaopt_suites() -> dict[str, Sequence[str]]:  # type: ignore[empty-body]
    """Offer suites: problems as text, such as `charlm(width=32)`, that are compared on together."""
