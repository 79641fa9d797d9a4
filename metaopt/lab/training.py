"""One training run with checkpoints; a run that was killed goes on bit for bit."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from metaopt.construction.building import build
from metaopt.distributed.shards import local
from metaopt.errors import CheckpointError, ProblemError
from metaopt.lab import checkpoint, resuming
from metaopt.lab.batches import cast
from metaopt.lab.dealing import tried
from metaopt.lab.device import usable_device
from metaopt.lab.holding import held
from metaopt.lab.named import problem_named
from metaopt.lab.parallel import WAYS, Alone, Parallel
from metaopt.lab.ranks import Ranks
from metaopt.lab.saving import KEPT, Saver
from metaopt.lab.stopping import Stopped, wishes_to_stop
from metaopt.lab.telling import told
from metaopt.lab.trial import cost_of_an_update
from metaopt.lab.weights import evaluated, shown
from metaopt.problem_class import Problem
from metaopt.specs.parsing import parse
from metaopt.stack import Stack

# what `--dtype` offers
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Result:
    """What a run ended with: the model, its stack, and the evaluation of `weights` on validation data."""

    model: torch.nn.Module
    stack: Stack
    evaluation: dict[str, float]
    weights: str


def train(
    problem: str | Problem,
    spec: str,
    *,
    steps: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    ranks: Ranks | None = None,
    parallel: str = "ddp",
    log: Path | str | None = None,
    checkpoint_every: int = 100,
    kept: int | None = None,
    resume: bool | Path = False,
    keep: Literal["live", "saved"] | None = None,
    extend: bool = False,
    progress: Callable[[int, Any], None] | None = None,
) -> Result:
    """Train a problem, or the one that a text names, for `steps` calls of `step()`, or as many as it says itself.

    The last `kept` checkpoints (3 if None) lie in `log/checkpoints`.

    `ranks` are the processes that train together (`ranks.joined`), and `parallel` is how they do; the batch is the
    problem's, dealt over them. `resume` continues the newest checkpoint, or the one named. The spec may be another one
    if `keep` says whose values are in force, and `steps` may be others with `extend`. `progress` gets the number of
    each step and its loss, over all ranks. Raises MetaoptError, for a loss that is not finite and a full disk or memory
    too: the last checkpoint stays.
    """
    problem = problem_named(problem) if isinstance(problem, str) else problem
    steps = problem.default_steps if steps is None else steps
    log = None if log is None else Path(log)
    ranks = ranks or Ranks(device=usable_device(device))
    device = ranks.device
    folder = None if log is None else log / "checkpoints"
    where = f"{spec} cannot train {type(problem).__name__.lower()}"
    with told(where, lambda: _kept(folder)), _owned(folder, ranks):
        total = _updates(problem, spec, steps, device)
        way = _parallel(problem, _model(problem, seed, device, dtype), ranks, parallel, seed, dtype)
        model = way.model
        # parameters, not the module: nobody could follow build's hint about decay here
        opt = build(model.named_parameters(), spec, total_steps=total, log=log)
        way.expect(opt)
        opt.train()
        run = {"problem": repr((type(problem).__name__, problem.given)), "spec": str(opt.spec), "seed": seed}
        run |= {"steps": steps, "data": problem.data_hash(), **({} if dtype is None else {"dtype": str(dtype)})}
        torch.manual_seed(seed)
        first = 0
        if resume:
            opt.resume_with(keep=keep, extend=extend)
            changeable = {*(["spec"] if keep else []), *(["steps"] if extend else [])}
            first = resuming.resume(resume, folder, run, changeable, model, opt, ranks, way.has_replicas)
        elif folder is not None and checkpoint.found(folder):
            raise CheckpointError(f"{folder} holds a run already: give --resume to continue it, or another --log")
        saver = None if folder is None else Saver(folder, ranks, KEPT if kept is None else kept, way.has_replicas)
        opt.join_replicas()
        with _closed(opt), _kept_whole(saver), wishes_to_stop() as way.wants_to_stop:
            batches = problem.batches(seed, device, start=first)
            for step in range(first + 1, steps + 1):
                loss = _step(way, opt, cast(next(batches), dtype))
                stops = way.has_to_stop() and step < steps
                if saver is not None and (step % checkpoint_every == 0 or step == steps or stops):
                    # read here alone, so that no update in between waits for the device
                    _check_finite(loss, model, step, saver)
                    saver.save(step, resuming.content_of(run, step, model, opt, device))
                if saver is not None:
                    saver.check()
                if progress is not None:
                    progress(step, loss)
                if stops:
                    raise Stopped(f"after step {step} of {steps}: {_continued(saver)}")
        if saver is not None:
            saver.settle()
        _check_finite(0.0, model, steps, saver)
        with shown(opt):
            evaluation = way.evaluate("validation")
    return Result(model, opt, evaluation, evaluated(opt))


@contextmanager
def _kept_whole(saver: Saver | None) -> Iterator[None]:
    """Let a run that fails keep the checkpoint that is being written; several ranks do not wait for one another."""
    try:
        yield
    except BaseException:
        if saver is not None and saver.ranks.size == 1:
            with suppress(CheckpointError):
                saver.settle()
        raise


def _continued(saver: Saver | None) -> str:
    """Return what is kept of a run that ends now, and how it goes on."""
    if saver is None:
        return "nothing was saved: give --log to be able to continue a run"
    saver.settle()
    return f"{checkpoint.newest(saver.folder)}. The same command with --resume continues"


def _model(problem: Problem, seed: int, device: str, dtype: torch.dtype | None) -> torch.nn.Module:
    """Return the problem's model; in another dtype it takes the problem's own inputs all the same."""
    model = problem.model(seed, device)
    if dtype is not None:
        model.to(dtype)
        model.register_forward_pre_hook(
            lambda _, args, named: (cast(args, dtype), cast(named, dtype)), with_kwargs=True
        )
    return model


def _parallel(
    problem: Problem, model: torch.nn.Module, ranks: Ranks, how: str, seed: int, dtype: torch.dtype | None
) -> Parallel:
    if ranks.size == 1:
        return Alone(problem, model, ranks)
    batch = cast(next(problem.batches(seed, ranks.device)), dtype)
    return WAYS[how](problem, model, ranks, tried(problem, model, batch))


def _updates(problem: Problem, spec: str, steps: int, device: str) -> int:
    """Return how many updates so many steps make: fewer where gradients are accumulated."""
    holds = any(getattr(part.target, "may_skip_updates", False) for part in parse(spec))
    return steps // cost_of_an_update(problem, spec, device, steps)[0] if holds else steps


def _kept(folder: Path | None) -> str:
    return checkpoint.newest(folder) if folder is not None and checkpoint.found(folder) else ""


def _owned(folder: Path | None, ranks: Ranks) -> AbstractContextManager[None]:
    return nullcontext() if folder is None or ranks.rank else held(folder, "checkpoints")


@contextmanager
def _closed(opt: Stack) -> Iterator[None]:
    """Close the log behind a run; behind one that failed quietly, for its failure is what is to be told."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            opt.close()
        raise
    opt.close()


def _step(way: Parallel, opt: Stack, batch: Any) -> Any:
    def closure() -> torch.Tensor:
        opt.zero_grad()
        return way.backward(batch)

    return opt.step(closure)


def _check_finite(loss: Any, model: torch.nn.Module, step: int, saver: Saver | None) -> None:
    """Raise ProblemError for a loss, or for weights made by the update after it, that are not finite."""
    value = float(loss.detach() if isinstance(loss, torch.Tensor) else loss)
    what = None if math.isfinite(value) else f"the loss is {value}"
    if what is None and not _all_finite([local(p.detach()) for p in model.parameters()]):
        what = "a weight is not finite"
    if what is not None:
        if saver is not None:
            saver.settle()
        folder = None if saver is None else saver.folder
        raise ProblemError(f"{what} at step {step}: lower lr or clip. {checkpoint.newest(folder)}")


def _all_finite(tensors: list[torch.Tensor]) -> bool:
    """Return whether all numbers are finite; waits for a device once, not for each tensor."""
    found = [tensor.isfinite().all() for tensor in tensors]
    return not found or bool(torch.stack([one.to(found[0].device) for one in found]).all())
