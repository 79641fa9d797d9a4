"""`metaopt explain`: what a pipeline, or the optimizer in a checkpoint, does to which parameters."""

import copy
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaopt.cli import Plugins, fitted
from metaopt.errors import HyperparameterError, SpecError

if TYPE_CHECKING:
    from metaopt.explaining.table import Explanation

ENDINGS = (".pt", ".pth", ".ckpt", ".bin")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("explain")(explain_what)


def explain_what(
    what: Annotated[str, typer.Argument(metavar="SPEC|CHECKPOINT", help="A pipeline as text, or a checkpoint file.")],
    problem: Annotated[str | None, typer.Option(help="Explain the pipeline on this problem's model.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Length of the run in updates.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Examples per update; the problem's own if it has one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    plugin: Plugins = [],  # noqa: B006  typer reads the default, nothing changes it
) -> None:
    """Explain what is done to which parameters, at which rates, and what looks like a mistake."""
    if os.path.isdir(what):
        raise SpecError(f"{what} is a directory: give the checkpoint's own file, or a pipeline")
    of_file = what.endswith(ENDINGS) or os.path.isfile(what)
    if of_file:
        from metaopt.explaining.report import explain_checkpoint

        explanation = explain_checkpoint(what)
    else:
        explanation = _explain_spec(what, problem, steps, batch_size)
    print(explanation.to_json() if as_json else fitted(str(explanation)))
    if not (of_file or as_json or problem):
        print("\nexplained over one 16 x 16 matrix: --problem NAME takes the model of a problem")


def _explain_spec(text: str, problem: str | None, steps: int | None, batch_size: int | None) -> "Explanation":
    import torch

    from metaopt.construction.building import build
    from metaopt.explaining.report import explain
    from metaopt.lab.named import problem_named

    if problem is None:
        # one weight matrix stands in for a model: rates and order do not depend on it, and it raises no finding
        model: torch.nn.Module = torch.nn.Linear(16, 16, bias=False)
    else:
        trained = problem_named(problem)
        model = trained.model(0, torch.device("cpu"))
        steps = steps or trained.default_steps
        if batch_size is None:
            batch_size = getattr(trained, "batch_size", None)
    stepped = copy.deepcopy(model)
    try:
        # parameters, not the module: build's hint about decay is a finding here
        stack = build(model.named_parameters(), text, total_steps=steps)
    except HyperparameterError as error:
        raise HyperparameterError(str(error).replace("total_steps", "--steps")) from None
    explanation = explain(stack, model, batch_size=batch_size)
    later = build(stepped.named_parameters(), text, total_steps=steps)
    try:
        _step_on_zeros(later, stepped)
    except (RuntimeError, TypeError):  # an optimizer that cannot step on dense zeros tells no state beforehand
        return explanation
    held = [row.state_bytes for row in explain(later).rows]
    rows = [replace(row, state_bytes=size) for row, size in zip(explanation.rows, held, strict=True)]
    return replace(explanation, rows=tuple(rows))


def _step_on_zeros(optimizer: Any, model: Any) -> None:
    """Make one update with zero gradients on a throw-away model: how much state there is shows only then."""
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 0.0
    optimizer.step(lambda: sum(p.detach().sum() * 0.0 for p in model.parameters()))
