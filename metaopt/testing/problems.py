"""Checks of problems: weights, batches and evaluation are functions of their seeds."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from metaopt.problem_class import Problem
from metaopt.testing.comparing import same
from metaopt.testing.feeding import own_random_numbers
from metaopt.testing.outcome import CheckFailed, check
from metaopt.testing.subject import Subject, weights


class ProblemSubject(Subject):
    """A problem with its defaults."""

    def made(self) -> Problem:
        """Return a new problem."""
        made: Problem = self.entry.target()
        return made


def _take(batches: Iterator[Any], many: int) -> list[Any]:
    return [next(batches) for _ in range(many)]


@check("problem")
def starts_from_its_seed(subject: ProblemSubject) -> None:
    """Initial weights depend on the seed alone; other seeds differ, and the global generators are left alone."""
    before = torch.random.get_rng_state()
    first, other = weights(subject.made().model(1)), weights(subject.made().model(2))
    if not same(before, torch.random.get_rng_state()):
        raise CheckFailed(
            f"{subject}: model(seed) draws from torch's global generator",
            "Contenders of a comparison would start with other weights, depending on what ran before",
            "Draw from torch.Generator().manual_seed(seed), or inside torch.random.fork_rng()",
        )
    with own_random_numbers(17):
        again = weights(subject.made().model(1))
    if not same(first, again) or same(first, other):
        raise CheckFailed(
            f"{subject}: the weights of a seed are not its own",
            "Seeds are what a comparison repeats over, and pairs",
            "Draw all initial weights from a generator seeded with `seed`",
        )


@check("problem")
def feeds_by_number(subject: ProblemSubject) -> None:
    """Batch n of a seed is the same from every start, in every object."""
    expected = _take(subject.made().batches(1), 6)
    again = _take(subject.made().batches(1, start=3), 3)
    if not all(same(_plain(a), _plain(b)) for a, b in zip(expected[3:], again, strict=True)):
        raise CheckFailed(
            f"{subject}: batches(seed, start=3) does not begin with batch 3 of batches(seed)",
            "A resumed run goes on with the next batch, not with the first one again",
            "Compute each batch from the seed and its number",
        )


def _plain(batch: Any) -> Any:
    return list(batch) if isinstance(batch, tuple) else batch


@check("problem")
def has_a_loss_to_descend(subject: ProblemSubject) -> None:
    """The loss is one finite number with a graph that reaches every parameter."""
    problem = subject.made()
    model = problem.model(0)
    loss = problem.loss(model, next(problem.batches(0)))
    if loss.dim() != 0 or not math.isfinite(float(loss)) or not loss.requires_grad:
        raise CheckFailed(
            f"{subject}: the loss is {loss!r:.80}", "It is differentiated", "Return a 0-dim tensor with its graph"
        )
    loss.backward()  # type: ignore[no-untyped-call]
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if without:
        raise CheckFailed(
            f"{subject}: the loss does not depend on {', '.join(without)}",
            "Such a parameter is never trained",
            "Leave it out of the model, or use it",
        )


@check("problem")
def evaluates_without_a_trace(subject: ProblemSubject) -> None:
    """Evaluation gives `loss` and every target, twice the same, and leaves model and generators alone."""
    problem = subject.made()
    model = problem.model(0)
    before = weights(model), torch.random.get_rng_state(), model.training
    for split in ("validation", "test"):
        first, second = problem.evaluate(model, split), problem.evaluate(model, split)
        missing = {"loss", *problem.targets} - first.keys()
        if missing or first != second or not all(isinstance(value, float) for value in first.values()):
            raise CheckFailed(
                f"{subject}: evaluate(model, {split!r}) gave {first} and then {second}"
                + (f"; {', '.join(sorted(missing))} is missing" if missing else ""),
                "Contenders are ranked by it",
                "Return {'loss': float, ...} with each name in `targets`, from the weights alone",
            )
    if not same(before, (weights(model), torch.random.get_rng_state(), model.training)):
        raise CheckFailed(
            f"{subject}: evaluating changed the weights, the training mode or the global generator",
            "A run that is evaluated more often would be another run",
            "Put train/eval mode back, and use generators of your own",
        )


@check("problem")
def names_its_data(subject: ProblemSubject) -> None:
    """`data_hash` is one text, the same from every object."""
    first, second = subject.made().data_hash(), subject.made().data_hash()
    if not isinstance(first, str) or first != second or not first:
        raise CheckFailed(
            f"{subject}: data_hash() is {first!r} and then {second!r}",
            "Results are kept only as long as the data are the same",
            "Hash the data and how they are split (hashlib, not hash())",
        )
