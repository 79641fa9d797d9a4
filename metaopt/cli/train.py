"""`metaopt train`: one run, with checkpoints, that `--resume` continues bit for bit."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from metaopt.cli import Interrupted, Keep, Plugins, progress_of
from metaopt.errors import CheckpointError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("train")(train)


def train(
    problem: Annotated[str, typer.Option(help="What is trained; see: metaopt list problems.")] = "digits",
    stack: Annotated[str, typer.Option(metavar="SPEC", help="The optimizer.")] = "adamw(lr=3e-3)",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps; the problem's own by default.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the initial weights and the batches.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    log: Annotated[Path | None, typer.Option(help="Directory of the run: its log and its checkpoints.")] = None,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --log.")] = False,
    keep: Annotated[
        Keep | None, typer.Option(help="With --resume and another --stack: whose constants are in force.")
    ] = None,
    extend: Annotated[bool, typer.Option("--extend", help="With --resume: allow other --steps.")] = False,
    plugin: Plugins = [],  # noqa: B006  typer reads the default, nothing changes it
) -> None:
    """Train a problem with a stack and print its evaluation on validation data."""
    from metaopt.lab import checkpoint
    from metaopt.lab.named import problem_named
    from metaopt.lab.train import train as run

    if (keep or extend) and not resume:
        raise CheckpointError("--keep and --extend say how a run is continued: give --resume as well")
    chosen = problem_named(problem)
    length = steps or chosen.default_steps
    done = 0
    if resume and log is not None and not checkpoint.found(log / "checkpoints"):
        # a run killed before its first checkpoint is continued so, and a mistyped directory looks the same
        print(f"metaopt: {log} holds no checkpoint: the run begins anew", file=sys.stderr)
    with progress_of(f"training {problem}") as show:

        def progress(step: int) -> None:
            nonlocal done
            done = step
            show(step, length)

        try:
            result = run(
                chosen,
                stack,
                steps=length,
                seed=seed,
                device=device,
                log=log,
                checkpoint_every=checkpoint_every,
                resume=resume,
                keep=None if keep is None else keep.value,
                extend=extend,
                progress=progress,
            )
        except KeyboardInterrupt:
            raise Interrupted(_kept(done, log)) from None
    report = result.stack.load_report
    if report is not None and (keep or extend):
        print(f"resumed; {report}", file=sys.stderr)
    values = ", ".join(f"{name} {value:.6g}" for name, value in result.evaluation.items())
    print(f"{result.stack.updates} updates: validation {values} ({result.weights} weights)")
    if log is not None:
        print(f"log and checkpoints: {log}; look at: tensorboard --logdir {log}")


def _kept(done: int, log: Path | None) -> str:
    """Return what an interrupted user still has, and how to go on."""
    from metaopt.lab import checkpoint

    if log is None:
        return f"{done} steps were made and nothing was saved: give --log to be able to continue a run"
    if not checkpoint.found(log / "checkpoints"):
        return f"{done} steps were made, none of them saved yet: --checkpoint-every says how often"
    return f"{done} steps were made. {checkpoint.newest(log / 'checkpoints')}. The same command with --resume continues"
