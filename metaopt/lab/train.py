"""One training run with checkpoints; a run that was killed goes on bit for bit."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from metaopt.construction.building import build
from metaopt.errors import CheckpointError, MetaoptWarning, ProblemError
from metaopt.lab import checkpoint
from metaopt.lab.batches import cast
from metaopt.lab.dealing import tried
from metaopt.lab.device import usable_device
from metaopt.lab.holding import held
from metaopt.lab.parallel import WAYS, Alone, Parallel
from metaopt.lab.ranks import Ranks
from metaopt.lab.telling import told
from metaopt.lab.trial import cost_of_an_update
from metaopt.lab.weights import evaluated, shown
from metaopt.problem import Problem
from metaopt.specs.pipeline import parse
from metaopt.stack import Stack

# what `--dtype` offers
DTYPES = {"float32": torch.float32, "float64": torch.float64}
CONTENT = {"run", "step", "model", "stack", "random"}


@dataclass(frozen=True)
class Result:
    """What a run ended with: the model, its stack, and the evaluation of `weights` on validation data."""

    model: torch.nn.Module
    stack: Stack
    evaluation: dict[str, float]
    weights: str


def train(
    problem: Problem,
    spec: str,
    *,
    steps: int,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    ranks: Ranks | None = None,
    parallel: str = "ddp",
    log: Path | None = None,
    checkpoint_every: int = 100,
    resume: bool | Path = False,
    keep: Literal["live", "saved"] | None = None,
    extend: bool = False,
    progress: Callable[[int, Any], None] | None = None,
) -> Result:
    """Train for `steps` calls of `step()`; checkpoints lie in `log/checkpoints`.

    `ranks` are the processes that train together (`ranks.joined`), and `parallel` is how they do; the batch is the
    problem's, dealt over them. `resume` continues the newest checkpoint, or the one named. The spec may be another one
    if `keep` says whose values are in force, and `steps` may be others with `extend`. `progress` gets the number of
    each step and its loss, over all ranks. Raises MetaoptError, for a loss that is not finite and a full disk or memory
    too: the last checkpoint stays.
    """
    ranks = ranks or Ranks(device=usable_device(device))
    device = ranks.device
    folder = None if log is None else log / "checkpoints"
    if folder is not None and ranks.size > 1 and parallel == "fsdp":
        raise CheckpointError("--parallel fsdp writes no checkpoints yet: leave --log out, or take --parallel ddp")
    where = f"{spec} cannot train {type(problem).__name__.lower()}"
    with told(where, lambda: _kept(folder)), _owned(folder, ranks):
        total = _updates(problem, spec, steps, device)
        way = _parallel(problem, _model(problem, seed, device, dtype), ranks, parallel, seed, dtype)
        model = way.model
        # parameters, not the module: nobody could follow build's hint about decay here
        opt = build(model.named_parameters(), spec, total_steps=total, log=log)
        opt.train()
        run = {"problem": repr((type(problem).__name__, problem.given)), "spec": str(opt.spec), "seed": seed}
        run |= {"steps": steps, "data": problem.data_hash(), **({} if dtype is None else {"dtype": str(dtype)})}
        torch.manual_seed(seed)
        if resume:
            opt.resume_with(keep=keep, extend=extend)
            changeable = {*(["spec"] if keep else []), *(["steps"] if extend else [])}
            first = _resume(resume, folder, run, changeable, model, opt, device)
        else:
            first = 0
        if not resume and folder is not None and checkpoint.found(folder):
            raise CheckpointError(f"{folder} holds a run already: give --resume to continue it, or another --log")
        with _closed(opt):
            batches = problem.batches(seed, device, start=first)
            for step in range(first + 1, steps + 1):
                loss = _step(way, opt, cast(next(batches), dtype))
                if folder is not None and (step % checkpoint_every == 0 or step == steps):
                    # read here alone, so that no update in between waits for the device
                    _check_finite(loss, model, step, folder)
                    if ranks.rank == 0:
                        checkpoint.save(folder, step, _content(run, step, model, opt))
                if progress is not None:
                    progress(step, loss)
        _check_finite(0.0, model, steps, folder)
        with shown(opt):
            evaluation = way.evaluate("validation")
    return Result(model, opt, evaluation, evaluated(opt))


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


def _check_finite(loss: Any, model: torch.nn.Module, step: int, folder: Path | None) -> None:
    """Raise ProblemError for a loss, or for weights made by the update after it, that are not finite."""
    value = float(loss.detach() if isinstance(loss, torch.Tensor) else loss)
    what = None if math.isfinite(value) else f"the loss is {value}"
    if what is None and not all(bool(p.isfinite().all()) for p in model.parameters()):
        what = "a weight is not finite"
    if what is not None:
        raise ProblemError(f"{what} at step {step}: lower lr or clip. {checkpoint.newest(folder)}")


def _content(run: dict[str, Any], step: int, model: torch.nn.Module, opt: Stack) -> dict[str, Any]:
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    return {"run": run, "step": step, "model": model.state_dict(), "stack": opt.state_dict(), "random": random}


def _resume(
    resume: bool | Path,
    folder: Path | None,
    run: dict[str, Any],
    changeable: set[str],
    model: torch.nn.Module,
    opt: Stack,
    device: str,
) -> int:
    if folder is None:
        raise CheckpointError("--resume needs --log: the directory of the run that is continued")
    paths = [resume] if isinstance(resume, Path) else checkpoint.found(folder)
    if not paths:
        return 0  # killed before its first checkpoint: the run starts again, and ends the same
    content = checkpoint.load(paths[0])
    if not isinstance(content, dict) or content.keys() != CONTENT or not isinstance(content["run"], dict):
        raise CheckpointError(
            f"{paths[0]} was not written by `metaopt train`: expected the entries {', '.join(sorted(CONTENT))}"
        )
    for key, value in run.items():
        if (there := content["run"].get(key)) != value and key not in changeable:
            way = {
                "spec": "; --keep live takes the new one, --keep saved the old values",
                "steps": "; --extend allows it",
            }
            raise CheckpointError(
                f"{paths[0]} is of another run: {key} is {there!r} there, {value!r} here{way.get(key, '')}"
            )
    model.load_state_dict(content["model"])
    with warnings.catch_warnings():
        if changeable:  # the load report says it, in a line of the command
            warnings.simplefilter("ignore", MetaoptWarning)
        opt.load_state_dict(content["stack"])
    torch.set_rng_state(content["random"]["cpu"])
    if device.startswith("cuda") and "cuda" in content["random"]:
        torch.cuda.set_rng_state(content["random"]["cuda"])
    step = int(content["step"])
    if step > run["steps"]:
        raise CheckpointError(f"{paths[0]} has made {step} steps already: give --steps {step} or more")
    return step
