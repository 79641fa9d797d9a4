"""`metaopt show`: one part in full; a schedule with its curve."""

import inspect
import math
import textwrap
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaopt.cli import Plugins
from metaopt.errors import MetaoptError, SpecError

if TYPE_CHECKING:
    from metaopt.registry import Entry
    from metaopt.schedule import Schedule

WIDTH = 60
HEIGHT = 10
NOTE_WIDTH = 100
EIGHTHS = " ▁▂▃▄▅▆▇█"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("show")(show)


def show(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help='A part, or a schedule such as "warmup(cosine(0.1), 0.1)".')
    ],
    steps: Annotated[int, typer.Option(min=1, help="Length of the run over which a curve is drawn.")] = 1000,
    plugin: Plugins = [],  # noqa: B006  typer reads the default, nothing changes it
) -> None:
    """Show a part's hyperparameters, formula, state and what others call it; a schedule's curve."""
    from metaopt.registry import registry

    if "(" in name:
        print("\n".join(curve(_schedule(name), steps)))
        return
    entry = registry.find(name)
    lines = _description(entry)
    if entry.kind == "schedule":
        lines += ["", *_example_curve(entry, steps)]
    print("\n".join(lines))


def _description(entry: "Entry") -> list[str]:
    from metaopt.registry import registry
    from metaopt.spec import part

    lines = [f"{entry.name}: {entry.kind} of {f'{entry.origin} {entry.version}'.strip()}", ""]
    documentation = inspect.getdoc(entry.target) or "(no description)"
    # torch's own pages of mathematics belong in a browser; the first paragraph says what it is
    paragraphs = documentation.split("\n\n")
    lines += (documentation if entry.origin == "metaopt" and len(paragraphs) < 4 else paragraphs[0]).splitlines()
    lines += [line for note in registry.notes(entry.name) for line in ("", *textwrap.wrap(note, NOTE_WIDTH))]
    lines += ["", "hyperparameters", *_table(part(entry.name).hyperparameters)]
    state = getattr(entry.target, "slots", None)
    if entry.kind == "wrapper" and isinstance(state, Mapping):
        lines += ["", "state per parameter"]
        lines += [f"  {slot}: {_slot(declared)}" for slot, declared in state.items()] or ["  none"]
        counters = [f"  {name}: {counted.doc}" for name, counted in entry.target.counters.items()]
        lines += ["", "counted in every group", *counters] if counters else []
    others = registry.known_as(entry)
    if others:
        lines += ["", f"elsewhere called {', '.join(others)}"]
    return lines


def _slot(declared: Any) -> str:
    meanings = {
        "anchor": "a copy of the parameter from right before its first update, moved along by wrappers farther out",
        "start": "a copy of the parameter from right before its first update; never follows",
        "zeros": "shaped like the parameter, zero at first",
        "moments": "zeros for each moment of the base, where a hyperparameter asks for them",
        "previous": "a copy of the parameter from right before its latest update",
    }
    dtype = f"; dtype: {declared.dtype}" if declared.dtype else ""
    early = "; there before the first update" if declared.early else ""
    return meanings[declared.kind] + early + dtype


def _table(hyperparameters: Mapping[str, Any]) -> list[str]:
    if not hyperparameters:
        return ["  none"]
    rows = [
        (h.name, "required" if h.required else repr(h.default), h.bounds(), _meaning(h))
        for h in hyperparameters.values()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  " + "  ".join([*(t.ljust(w) for t, w in zip(row[:3], widths, strict=True)), row[3]]).rstrip() for row in rows
    ]


def _meaning(hyperparameter: Any) -> str:
    others = f" (elsewhere {', '.join(hyperparameter.known_as)})" if hyperparameter.known_as else ""
    return f"{hyperparameter.doc}{others}"


def _schedule(text: str) -> "Schedule":
    """Read a schedule from text; any other part is shown by its bare name."""
    from metaopt.registry import registry
    from metaopt.spec import parse_schedule

    name = text.partition("(")[0].strip()
    if registry.find(name).kind != "schedule":
        raise SpecError(f"a curve is shown of a schedule alone; for {name} itself: metaopt show {name}")
    return parse_schedule(text)


def _example_curve(entry: "Entry", steps: int) -> list[str]:
    try:
        example: Schedule = entry.target(**_examples(entry, steps))
        return curve(example, steps)
    except (MetaoptError, TypeError, ValueError, ArithmeticError):
        return [f'see its curve with arguments of your own: metaopt show "{entry.name}(...)"']


def _examples(entry: "Entry", steps: int) -> dict[str, Any]:
    """Return a value for every required hyperparameter: the first number is 1, lengths are a tenth of the run."""
    from metaopt.spec import part

    given: dict[str, Any] = {}
    for name, hyperparameter in part(entry.name).hyperparameters.items():
        if not hyperparameter.required:
            continue
        kind = str(hyperparameter.kind)
        if "Schedule" in kind or name == "schedule":
            given[name] = part("cosine", "schedule")(1.0)
        elif hyperparameter.kind is int or "int" in kind:
            given[name] = max(1, steps // 10)
        else:
            given[name] = 0.1 if given else 1.0
    return given


def curve(schedule: "Schedule", steps: int) -> list[str]:
    """Return a picture of a schedule over a run: height is the value, width the updates."""
    from metaopt.spec import to_text

    value: Callable[[float], float] = schedule.over(steps, steps)
    try:
        columns = [value(round(column * (steps - 1) / (WIDTH - 1))) for column in range(WIDTH)]
    except ArithmeticError as error:
        raise SpecError(f"the curve of {schedule!r:.80} cannot be computed: {error}") from None
    if not all(map(math.isfinite, columns)):
        raise SpecError(f"the curve of {schedule!r:.80} is not finite everywhere")
    top, bottom = max(columns), min(0.0, min(columns))
    reach = (top - bottom) or 1.0
    heights = [round((value - bottom) / reach * HEIGHT * 8) for value in columns]
    lines = [to_text(schedule, "show")]
    for line in range(HEIGHT - 1, -1, -1):
        label = {HEIGHT - 1: f"{top:.4g}", 0: f"{bottom:.4g}"}.get(line, "")
        lines.append(f"{label:>10} │{''.join(EIGHTHS[min(8, max(0, height - 8 * line))] for height in heights)}")
    lines.append(f"{'':>10} └{'─' * WIDTH}")
    lines.append(f"{'':>12}0{steps:>{WIDTH - 1}} updates")
    return lines
