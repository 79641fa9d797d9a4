"""Running a file that `metaopt eject` has written beside the stack."""

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from metaopt.construction.building import build
from metaopt.ejecting.branches import sample
from metaopt.errors import MetaoptWarning, SpecError
from metaopt.programs import kernels
from metaopt.rules import rules_of
from metaopt.specs.pipeline import Pipeline
from metaopt.stack import Stack

# updates over which the written file is compared with the stack
COMPARED = 60


def try_out(text: str, pipeline: Pipeline, total_steps: int | None, branches: Mapping[str, Pipeline]) -> None:
    """Run the file beside the stack on small parameters. Raises SpecError if it fails or differs."""
    namespace: dict[str, Any] = {"__name__": "ejected"}
    exec(compile(text, "<ejected>", "exec"), namespace)  # our own text
    generator = torch.Generator().manual_seed(0)
    named, others = sample(branches, str(pipeline)), sample(branches, str(pipeline))
    ours, theirs = ([p for _, p in each] for each in (named, others))
    for p, q in zip(ours, theirs, strict=True):
        p.data.normal_(generator=generator)
        q.data.copy_(p.data)
    stack = build(named, pipeline, total_steps=total_steps)
    same = partial(torch.allclose, rtol=1e-5, atol=1e-6) if _adds_up_otherwise(stack) else torch.equal
    try:
        other = namespace["make_optimizer"](others if branches else theirs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MetaoptWarning)  # the run may be shorter than this one
            for step in range(COMPARED):
                for number, (p, q) in enumerate(zip(ours, theirs, strict=True)):
                    p.grad = torch.randn(p.shape, generator=generator)
                    # of several bases one has nothing to do now and then
                    p.grad = None if branches and step % 7 == 3 and number < 2 else p.grad
                    q.grad = None if p.grad is None else p.grad.clone()
                stack.step()
                other.step()
                if not all(map(same, ours, theirs)):
                    raise SpecError("eject: the file would not train as the stack does; please report this spec")
    except (AttributeError, KeyError, TypeError, NameError) as error:
        needed = getattr(error, "name", None) or error
        raise SpecError(f"eject: a part of {pipeline} needs {needed}, which an ejected file does not have") from error


def _adds_up_otherwise(stack: Stack) -> bool:
    """Return whether sums over an update may be added up in another order than torch's, by the optional library."""
    return kernels() is not None and any(
        rule.graph.sums for chain in stack.chains for wrapper in chain.ordered for rule in rules_of(type(wrapper))
    )
