"""`metaopt train`: one run, with checkpoints, that `--resume` continues bit for bit; by itself or under torchrun."""

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from metaopt.cli import INTERRUPTED, TERMINATED, Interrupted, Plugins, Progress, fail, progress_of
from metaopt.errors import CheckpointError, MetaoptError, ProblemError

if TYPE_CHECKING:
    from metaopt.lab.ranks import Ranks
    from metaopt.lab.training import Result


class Way(StrEnum):
    """How the ranks that torchrun starts train one model."""

    ddp = "ddp"
    fsdp = "fsdp"
    local = "local"


class Dtype(StrEnum):
    """The dtype of the model and of its inputs."""

    float32 = "float32"
    float64 = "float64"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("train")(train)


def train(
    problem: Annotated[str, typer.Option(help="What is trained; see: metaopt list problems.")] = "digits",
    stack: Annotated[str, typer.Option(metavar="SPEC", help="The optimizer.")] = "adamw(lr=3e-3)",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps; the problem's own by default.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the initial weights and the batches.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda (a GPU for each process of torchrun), ...")] = "cpu",
    dtype: Annotated[Dtype | None, typer.Option(help="Of the model; the problem's own by default.")] = None,
    parallel: Annotated[Way | None, typer.Option(help="With torchrun: how the processes train together [ddp].")] = None,
    log: Annotated[Path | None, typer.Option(help="Directory of the run: its log and its checkpoints.")] = None,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --log.")] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N|live|saved",
            help="How many checkpoints are kept [3]; with --resume and another --stack, whose constants are in force.",
        ),
    ] = None,
    extend: Annotated[bool, typer.Option("--extend", help="With --resume: allow other --steps.")] = False,
    plugin: Plugins = [],  # noqa: B006  typer reads the default, nothing changes it
) -> None:
    """Train a problem with a stack and print its evaluation on validation data.

    Several processes train together under torchrun: torchrun --nproc-per-node 2 -m metaopt train ...
    """
    from metaopt.lab.named import problem_named
    from metaopt.lab.ranks import joined, number_of_ranks, restarts, this_rank

    kept, whose = _read_keep(keep or [])
    if (whose or extend) and not resume:
        raise CheckpointError(
            "--keep live, --keep saved and --extend say how a run is continued: give --resume as well"
        )
    if parallel and number_of_ranks() == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        raise ProblemError(
            f"--parallel {parallel} is for several processes: start them with "
            f"torchrun --nproc-per-node 2 -m metaopt train"
        )
    chosen = problem_named(problem)
    length = steps or chosen.default_steps
    here = this_rank()
    with _one_voice(here), joined(here, device) as ranks:
        from metaopt.lab import checkpoint
        from metaopt.lab.stopping import Stopped
        from metaopt.lab.training import DTYPES
        from metaopt.lab.training import train as run

        # what torchrun starts again goes on, whether or not it was told to resume
        goes_on = resume or (restarts() > 0 and log is not None)
        done = 0
        if resume and ranks.rank == 0 and log is not None and not checkpoint.found(log / "checkpoints"):
            # a run killed before its first checkpoint is continued so, and a mistyped directory looks the same
            print(f"metaopt: {log} holds no checkpoint: the run begins anew", file=sys.stderr)
        with _progress(f"training {problem}", ranks) as show:

            def progress(step: int, loss: object) -> None:
                nonlocal done
                done = step
                show(step, length)

            try:
                result = run(
                    chosen,
                    stack,
                    steps=length,
                    seed=seed,
                    dtype=None if dtype is None else DTYPES[dtype.value],
                    ranks=ranks,
                    parallel=(parallel or Way.ddp).value,
                    log=log,
                    checkpoint_every=checkpoint_every,
                    kept=kept,
                    resume=goes_on,
                    keep=whose,
                    extend=extend,
                    progress=progress,
                )
            except KeyboardInterrupt:
                raise Interrupted(_kept(done, log)) from None
            except Stopped as stopped:
                raise Interrupted(str(stopped), status=TERMINATED) from None
        if ranks.rank == 0:
            _report(result, log, loaded=whose is not None or extend)


def _read_keep(given: list[str]) -> tuple[int | None, Literal["live", "saved"] | None]:
    """Return how many checkpoints are kept, and whose constants are in force. Raises CheckpointError."""
    kept: int | None = None
    whose: Literal["live", "saved"] | None = None
    for value in given:
        if value.isdigit() and int(value) > 0:
            kept = int(value)
        elif value == "live" or value == "saved":
            whose = "live" if value == "live" else "saved"
        else:
            raise CheckpointError(
                f"--keep must be how many checkpoints are kept, such as 3, or live or saved, got {value}"
            )
    return kept, whose


def _report(result: "Result", log: Path | None, *, loaded: bool) -> None:
    """Print how a run ended."""
    report = result.stack.load_report
    if report is not None and loaded:
        print(f"resumed; {report}", file=sys.stderr)
    values = ", ".join(f"{name} {value:.6g}" for name, value in result.evaluation.items())
    print(f"{result.stack.updates} updates: validation {values} ({result.weights} weights)")
    if log is not None:
        print(f"log and checkpoints: {log}; look at: tensorboard --logdir {log}")


@contextlib.contextmanager
def _progress(what: str, ranks: "Ranks") -> Iterator[Progress]:
    if ranks.rank:
        yield lambda done, total: None
        return
    with progress_of(what) as show:
        yield show


@contextlib.contextmanager
def _one_voice(ranks: "Ranks") -> Iterator[None]:
    """Among several ranks, let only one tell what went wrong, and end each of them at once.

    A rank that fails takes no part in the collective that the others wait in: it must not wait for them at its exit.
    """
    if ranks.size == 1:
        yield
        return
    try:
        with warnings.catch_warnings():
            if ranks.rank:
                warnings.simplefilter("ignore")
            yield
    except BaseException as error:
        status = 2
        if isinstance(error, KeyboardInterrupt | Interrupted):
            status = error.status if isinstance(error, Interrupted) else INTERRUPTED
        if ranks.is_first_to_tell():
            if isinstance(error, KeyboardInterrupt | Interrupted):
                fail(f"interrupted: {error}" if str(error) else "interrupted")
            elif isinstance(error, MetaoptError):
                fail(error)
            else:
                traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _kept(done: int, log: Path | None) -> str:
    """Return what an interrupted user still has, and how to go on."""
    from metaopt.lab import checkpoint

    if log is None:
        return f"{done} steps were made and nothing was saved: give --log to be able to continue a run"
    if not checkpoint.found(log / "checkpoints"):
        return f"{done} steps were made, none of them saved yet: --checkpoint-every says how often"
    return f"{done} steps were made. {checkpoint.newest(log / 'checkpoints')}. The same command with --resume continues"
