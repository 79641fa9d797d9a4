"""`metaopt tune`: choose values for the search spaces of a spec."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metaopt.cli import Interrupted, Plugins, progress_of

if TYPE_CHECKING:
    from metaopt.lab.tuning import Tuning

SHOWN = 5


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("tune")(tune)


def tune(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help='With spaces, such as "adamw(lr=log(1e-4, 1e-1))".')],
    problem: Annotated[str, typer.Option(help="What is trained; see: metaopt list problems.")] = "digits",
    trials: Annotated[int, typer.Option(min=2, help="Settings that are tried.")] = 30,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Gradient evaluations of each; the problem's own by default.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(metavar="TUNER", help="See: metaopt list tuners. By default gp; long runs: halving."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the search.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, one thread each; the result is the same.")] = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="Where results go; an interrupted search goes on there.")] = Path(
        "runs/tune"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    plugin: Plugins = [],  # noqa: B006  typer reads the default, nothing changes it
) -> None:
    """Find values for the spaces of a spec: train with many on validation data, print the best as a spec."""
    from metaopt.lab.tuning import tune as run

    finished = 0
    with progress_of("trials") as show:

        def progress(done: int, total: int) -> None:
            nonlocal finished
            finished = done
            show(done, total)

        try:
            found = run(
                spec,
                problem=problem,
                trials=trials,
                steps=steps,
                method=method,
                seed=seed,
                jobs=jobs,
                device=device,
                out=out,
                plugins=plugin,
                progress=progress,
            )
        except KeyboardInterrupt:
            kept = f"{finished} trials are done and kept in {out}; the same command goes on from there"
            raise Interrupted(kept if finished else "") from None
    print(json.dumps(found.to_dict(), indent=1) if as_json else "\n".join(_lines(found, out)))


def _lines(found: "Tuning", out: Path) -> list[str]:
    """Return the best spec by itself, and what else is worth knowing."""
    whole = sorted((trial for trial in found.trials if trial.whole), key=lambda trial: trial.loss)
    lost = sum(math.isinf(trial.loss) for trial in found.trials)
    lines = [found.best.spec, "", f"validation loss {found.best.loss:.6g} on {found.problem}; the next best:"]
    lines += [f"  {trial.loss:.6g}  {trial.spec}" for trial in whole[1:SHOWN]]
    lines.append(
        f"{len({trial.spec for trial in found.trials})} settings, {found.evaluations} gradient evaluations, by "
        f"{found.method}" + (f"; {lost} runs diverged or failed" if lost else "")
    )
    lines.append(f"one training seed each: small differences are noise. Written to {out}: results.json")
    return lines
