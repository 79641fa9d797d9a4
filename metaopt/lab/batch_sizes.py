"""Other batch sizes of a problem: half and twice its own, over as many samples."""

from collections.abc import Sequence

from metaopt.errors import ProblemError
from metaopt.lab.batches import tensors
from metaopt.lab.named import problem_named
from metaopt.problem_class import Problem

LR, BATCH_SIZE = "lr", "batch_size"


def sensitivities(asked: str | Sequence[str]) -> tuple[str, ...]:
    """Return what the final loss is shown over: "lr", "batch_size" or both. Raises ProblemError."""
    names = [name.strip() for name in asked.split(",")] if isinstance(asked, str) else list(asked)
    unknown = next((name for name in names if name not in (LR, BATCH_SIZE)), None)
    if unknown is not None or not names:
        raise ProblemError(f"--sensitivity must be lr, batch_size or lr,batch_size, got {','.join(names) or 'nothing'}")
    return tuple(dict.fromkeys(names))


def own_batch_size(problem: Problem, text: str) -> int:
    """Return the batch size of a problem. Raises ProblemError for one that does not take it as an argument."""
    size = getattr(problem, BATCH_SIZE, None)
    if BATCH_SIZE not in problem.hyperparameters or not isinstance(size, int):
        raise ProblemError(
            f"--sensitivity batch_size needs a problem that takes batch_size=, {text} does not: leave batch_size out, "
            f"or declare it in the problem's class, `{BATCH_SIZE}: int = hyper(64, ge=1)`"
        )
    return size


def resized(text: str, problem: Problem, budget: int) -> dict[int, tuple[str, Problem, int]]:
    """Return by batch size the same problem with it: as text, made, and the evaluations over as many samples.

    Raises ProblemError where a batch does not have so many samples, or the budget is too small.
    """
    own, found, numbers = own_batch_size(problem, text), {}, _numbers(problem)
    for size in (own // 2, 2 * own):
        if not size:
            continue
        head = text.partition("(")[0].strip()
        given = {**problem.given, BATCH_SIZE: size}
        written = f"{head}({', '.join(f'{name}={value!r}' for name, value in given.items())})"
        other, evaluations = problem_named(written), budget * own // size
        if not evaluations:
            raise ProblemError(f"--steps {budget} is less than one batch of {size}: give more, or leave batch_size out")
        # a batch without tensors is of a kind that nobody can count here: 0 == 0
        if numbers * size != own * _numbers(other):
            raise ProblemError(
                f"--sensitivity batch_size: a batch of {written} does not hold {size} samples, perhaps because the "
                f"data have fewer: give the problem a batch size of which twice as much is there"
            )
        found[size] = written, other, evaluations
    return found


def _numbers(problem: Problem) -> int:
    """Return how many numbers the tensors of a batch hold."""
    return sum(tensor.numel() for tensor in tensors(next(problem.batches(0))))
