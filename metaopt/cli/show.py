"""`metaopt show`: one part in full; a schedule with its curve."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaopt.cli import Plugins, fitted
from metaopt.errors import MetaoptError, SpecError

if TYPE_CHECKING:
    from metaopt.registry import Entry
    from metaopt.schedule import Schedule
    from metaopt.space import Space

SHOWN = 20
WIDTH = 60
HEIGHT = 10
SAMPLES = 10_000
EIGHTHS = " ▁▂▃▄▅▆▇█"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("show")(show)


def show(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help='A part, or a schedule or space: "warmup(cosine(0.1), 0.1)".')
    ],
    steps: Annotated[int, typer.Option(min=1, help="Length of the run over which a curve is drawn.")] = 1000,
    plugin: Plugins = [],  # noqa: B006  typer reads the default, nothing changes it
) -> None:
    """Show a part's hyperparameters, formula, state and what others call it; a schedule's curve; a space's values."""
    from metaopt.registry import registry
    from metaopt.specs.parsing import parse_value

    if "(" in name:
        space = registry.find(name.partition("(")[0].strip()).kind == "space"
        print("\n".join(_values(parse_value(name)) if space else curve(_schedule(name), steps)))
        return
    entry = registry.find(name)
    lines = _description(entry)
    if entry.kind == "schedule":
        lines += ["", *_example_curve(entry, steps)]
    print(fitted("\n".join(lines)))


def _description(entry: "Entry") -> list[str]:
    from metaopt.docstrings import links, meanings
    from metaopt.registry import registry
    from metaopt.specs.pipeline import part

    lines = [f"{entry.name}: {entry.kind} of {f'{entry.origin} {entry.version}'.strip()}", ""]
    paragraphs = (inspect.getdoc(entry.target) or "(no description)").split("\n\n")
    # torch's own pages of mathematics belong in a browser; the first paragraph says what it is
    if entry.origin != "metaopt" or len(paragraphs) > 3:
        del paragraphs[1:]
    paragraphs += [paragraph for note in registry.notes(entry.name) for paragraph in note.split("\n\n")]
    lines += "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs).splitlines()
    if entry.origin != "metaopt" or entry.kind == "optimizer":
        lines += ["", *(f"see {link}" for link in links(entry.target))] if links(entry.target) else []
    lines += ["", "hyperparameters", *_table(part(entry.name).hyperparameters, meanings(entry.target))]
    if entry.kind == "optimizer":
        lines += _kept_by_base(entry)
    state = getattr(entry.target, "slots", None)
    if entry.kind == "wrapper" and isinstance(state, Mapping):
        lines += ["", "state per parameter"]
        lines += [f"  {slot}: {_slot(declared)}" for slot, declared in state.items()] or ["  none"]
        numbers = [f"  {name}: {_number(kept)}" for name, kept in entry.target.scalars.items()]
        lines += ["", "kept on the device", *numbers] if numbers else []
        counters = [f"  {name}: {counted.doc}" for name, counted in entry.target.counters.items()]
        lines += ["", "counted in every group", *counters] if counters else []
    others = registry.known_as(entry)
    if others:
        lines += ["", f"elsewhere called {', '.join(others)}"]
    return lines


def _kept_by_base(entry: "Entry") -> list[str]:
    """Return what a base keeps of a small matrix after an update; nothing where it cannot make one by itself."""
    import torch

    from metaopt.construction.building import build
    from metaopt.registry import registry

    example = registry.examples(entry.name)[0]
    matrix = torch.nn.Parameter(torch.ones(4, 3))
    try:
        stack = build([matrix], example.spec or entry.name)
        matrix.grad = torch.ones(4, 3).to_sparse(1) if example.gradients == "sparse" else torch.ones(4, 3)
        stack.step(lambda: matrix.detach().sum())
    except Exception:  # a class from elsewhere may want more than one matrix with one gradient
        return []
    chosen = ["", "metaopt.build runs it with fused=True where torch can; exact=True leaves the kernel to torch"]
    fused = chosen if stack.param_groups[0].get("fused") else []
    kept = [f"  {key}: {_form(value, matrix)}" for key, value in stack.state.get(matrix, {}).items()]
    return ["", f"state per parameter of {example.spec or entry.name}", *(kept or ["  none"]), *fused]


def _form(value: Any, parameter: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is None:
        return "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
    if shape == parameter.shape:
        return "shaped like the parameter"
    return "one number" if value.numel() == 1 else f"{tuple(shape)}, of a parameter of {tuple(parameter.shape)}"


def _slot(declared: Any) -> str:
    meanings = {
        "anchor": "a copy of the parameter from right before its first update, moved along by wrappers farther out",
        "start": "a copy of the parameter from right before its first update; never follows",
        "zeros": "shaped like the parameter, zero at first",
        "moments": "zeros for each moment of the base, where a hyperparameter asks for them",
        "scalar": "one number for each parameter",
        "previous": "the parameter's value from right before the update, during it only",
    }
    dtype = f"; dtype: {declared.dtype}" if declared.dtype else ""
    early = "; there before the first update" if declared.early else ""
    return meanings[declared.kind] + early + dtype


def _number(declared: Any) -> str:
    what = "one number" if declared.size is None else f"numbers ({declared.size})"
    owner = "the run" if declared.per == "run" else "each group"
    return f"{what} for {owner}" + (f": {declared.doc}" if declared.doc else "")


def _table(hyperparameters: Mapping[str, Any], told: Mapping[str, str]) -> list[str]:
    if not hyperparameters:
        return ["  none by name"]
    rows = [
        (h.name, "required" if h.required else repr(h.default), h.bounds(), _meaning(h, told))
        for h in hyperparameters.values()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  " + "  ".join([*(t.ljust(w) for t, w in zip(row[:3], widths, strict=True)), row[3]]).rstrip() for row in rows
    ]


def _meaning(hyperparameter: Any, told: Mapping[str, str]) -> str:
    others = f" (elsewhere {', '.join(hyperparameter.known_as)})" if hyperparameter.known_as else ""
    return f"{hyperparameter.doc or told.get(hyperparameter.name, '')}{others}"


def _schedule(text: str) -> "Schedule":
    """Read a schedule from text; any other part is shown by its bare name."""
    from metaopt.registry import registry
    from metaopt.specs.parsing import parse_schedule

    name = text.partition("(")[0].strip()
    if registry.find(name).kind != "schedule":
        raise SpecError(f"a curve is shown of a schedule alone; for {name} itself: metaopt show {name}")
    return parse_schedule(text)


def _values(space: "Space") -> list[str]:
    """Return a space as text and some of its values: those that divide it into tenths, or its options."""
    from metaopt.specs.text import to_text

    options = space.options()
    values = [space.value(tenth / 10) for tenth in range(11)] if options is None else options[:SHOWN]
    more = "" if options is None or len(options) <= SHOWN else f", ... ({len(options)} values)"
    return [to_text(space, "show"), f"  {', '.join(to_text(value, 'show') for value in values)}{more}"]


def _example_curve(entry: "Entry", steps: int) -> list[str]:
    try:
        example: Schedule = entry.target(**_examples(entry, steps))
        return curve(example, steps)
    except (MetaoptError, TypeError, ValueError, ArithmeticError):
        return [f'see its curve with arguments of your own: metaopt show "{entry.name}(...)"']


def _examples(entry: "Entry", steps: int) -> dict[str, Any]:
    """Return a value for every required hyperparameter: the first number is 1, lengths are a tenth of the run."""
    from metaopt.specs.pipeline import part

    given: dict[str, Any] = {}
    for name, hyperparameter in part(entry.name).hyperparameters.items():
        if not hyperparameter.required:
            continue
        kind = str(hyperparameter.type)
        if "Schedule" in kind or name == "schedule":
            given[name] = part("cosine", "schedule")(1.0)
        elif hyperparameter.type is int or "int" in kind:
            given[name] = max(1, steps // 10)
        else:
            given[name] = 0.1 if given else 1.0
    return given


def curve(schedule: "Schedule", steps: int) -> list[str]:
    """Return a picture of a schedule over a run: height is the value, width the updates."""
    from metaopt.specs.text import to_text

    value: Callable[[float], float] = schedule.curve(steps, steps)
    try:
        columns = [value(round(column * (steps - 1) / (WIDTH - 1))) for column in range(WIDTH)]
    except ArithmeticError as error:
        raise SpecError(f"the curve of {schedule!r:.80} cannot be computed: {error}") from None
    if not all(map(math.isfinite, columns)):
        raise SpecError(f"the curve of {schedule!r:.80} is not finite everywhere")
    # a peak may stand between two columns
    every = [value(t) for t in range(0, steps, max(1, steps // SAMPLES))]
    top, bottom = max(every), min(0.0, min(every))
    reach = (top - bottom) or 1.0
    heights = [round((value - bottom) / reach * HEIGHT * 8) for value in columns]
    lines = [to_text(schedule, "show")]
    for line in range(HEIGHT - 1, -1, -1):
        label = {HEIGHT - 1: f"{top:.4g}", 0: f"{bottom:.4g}"}.get(line, "")
        lines.append(f"{label:>10} │{''.join(EIGHTHS[min(8, max(0, height - 8 * line))] for height in heights)}")
    lines.append(f"{'':>10} └{'─' * WIDTH}")
    lines.append(f"{'':>12}0{steps:>{WIDTH - 1}} updates")
    return lines
