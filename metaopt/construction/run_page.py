"""What the log shows of a run before its first point: its parts, its groups, its schedules drawn, and a dashboard.

The text under `metaopt/stack` is JSON, for programs such as the TensorBoard plugin:

    {"spec": "clip_grad_norm | adamw(lr=warmup(cosine(0.001), 0.1))",
     "parts": [{"name": "adamw", "label": "", "kind": "optimizer", "acts_on": "parameters",
                "hyperparameters": {"weight_decay": 0.01, ...}, "given": ["lr"],
                "scheduled": {"lr": "warmup(cosine(0.001), 0.1)"}, "measures": ["train/learning_rate"]}, ...]}

`parts` are in the order in which the data flows. `hyperparameters` holds constants, those that were left at their
defaults too; `given` are the names that were written. `values` names the tags of scheduled values other than the rate;
those of groups with schedules of their own are below. Each of `measures` is a tag of scalars, and the tags below it
(`<tag>/...`) belong to it. A part that has pipelines of its own has them in `branches`: {name: [part, ...]}.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from metaopt.engine.chain import RUN_FLAGS
from metaopt.errors import SpecError
from metaopt.explaining.report import table_of
from metaopt.logger import Layout, RunPage, Table
from metaopt.schedule import Schedule
from metaopt.scheduled_values import tag_of
from metaopt.specs.pipeline import Part, Pipeline
from metaopt.specs.text import to_text
from metaopt.stack import Stack
from metaopt.wrapper import Wrapper

STACK = "metaopt/stack"
# points of a drawn schedule
POINTS = 400


def run_page(stack: Stack) -> RunPage:
    """Return what a logger shows of a run before its first point."""
    if stack.description is None:
        return RunPage(tables={"metaopt/groups": table_of(stack)})
    pipeline: Pipeline = stack.spec
    rates = "train/learning_rate"  # the charts take it for the beginning of the tags, one for each group
    parts = [_part(part, rates) for part in pipeline]
    return RunPage(
        texts={STACK: json.dumps({"spec": as_text(pipeline), "parts": parts})},
        tables={"metaopt/parts": _expansion(pipeline), "metaopt/groups": table_of(stack)},
        images={f"metaopt/schedule/{key}": image for key, image in _drawn(stack)},
        layout=_layout(stack, rates),
    )


# ---- the parts


def _part(part: Part, rates: str) -> dict[str, Any]:
    label = "" if part.kind == "optimizer" else part.label or part.name.rpartition(".")[2]
    values = {name: part.arguments.get(name, declared.default) for name, declared in part.hyperparameters.items()}
    scheduled = {name: as_text(value) for name, value in values.items() if isinstance(value, Schedule)}
    branches = _branches(part)
    # flags that say how the base runs change nothing of the method
    left_out = {*scheduled, *(RUN_FLAGS - part.arguments.keys() if part.kind == "optimizer" else ())}
    constants = {k: _json(value) for k, value in values.items() if k not in left_out and not _is_pipelines(value)}
    measures = [f"{label}/{name}" for name in getattr(part.target, "measures", ())]
    tags = {name: tag_of(f"{label}.{name}" if label else name) for name in scheduled if name != "lr"}
    return {
        "name": part.name,
        "label": label,
        "kind": part.kind,
        "acts_on": _acts_on(part),
        "hyperparameters": constants,
        "given": [name for name in part.arguments if name in constants or name in scheduled],
        "scheduled": scheduled,
        **({"values": tags} if tags else {}),
        "measures": [rates] if part.kind == "optimizer" else measures,
        **({"branches": {name: [_part(p, rates) for p in own] for name, own in branches}} if branches else {}),
    }


def _acts_on(part: Part) -> str:
    """Return the first thing that a part changes, in the order of an update."""
    if part.kind == "optimizer":
        return "parameters"
    hooks = part.target.implemented_hooks()
    if part.target.observes:
        return "nothing"
    for hook, what in (
        ("around", "loss"),
        ("on_gradients", "gradients"),
        ("before_update", "parameters"),
        ("on_update", "update"),
        ("after_updates", "update"),
    ):
        if hook in hooks:
            return what
    return "parameters" if part.target.moves_weights() else "averages"


def _branches(part: Part) -> list[tuple[str, Sequence[Part]]]:
    if part.is_partition:
        return [(name, tuple(own)) for name, own in part.arguments.get("parts", {}).items()]
    if part.is_sequence:
        members = part.arguments.get("members", ())
        lengths = [member for member in members if not isinstance(member, Pipeline)]
        stages = [member for member in members if isinstance(member, Pipeline)]
        named = [f"{i + 1} for {lengths[i]}" if i < len(lengths) else str(i + 1) for i in range(len(stages))]
        return [(name, tuple(own)) for name, own in zip(named, stages, strict=True)]
    return []


def _is_pipelines(value: Any) -> bool:
    members = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else ()
    return any(isinstance(member, Pipeline) for member in members)


def _expansion(pipeline: Pipeline) -> Table:
    """Return a table of all parts with every hyperparameter, those at their defaults too."""
    rows: list[tuple[str, str, str]] = []
    for depth, part in _flat(pipeline):
        entry = _part(part, "")
        values = {**entry["scheduled"], **entry["hyperparameters"]}
        given = [f"{name}={values[name]}" for name in entry["given"]]
        defaults = [f"{name}={value}" for name, value in values.items() if name not in entry["given"]]
        name = part.name if entry["label"] in ("", part.name) else f"{part.name} ({entry['label']})"
        rows.append((f"{depth}{name}", ", ".join(given), ", ".join(defaults)))
    return Table(("part", "written", "left at the default"), tuple(rows))


def _flat(parts: Sequence[Part] | Pipeline, depth: str = "") -> Iterator[tuple[str, Part]]:
    for part in parts:
        yield depth, part
        for name, own in _branches(part):
            yield from _flat(own, f"{depth}{name}: ")


def as_text(value: Any) -> str:
    """Return a pipeline or a schedule as text that is read back, or in words if it has none."""
    try:
        return str(value) if isinstance(value, Pipeline) else to_text(value, "the log")
    except SpecError:
        return repr(value)


def _json(value: Any) -> Any:
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if value - value == 0.0 else str(value)
    if isinstance(value, list | tuple):
        return [_json(member) for member in value]
    return str(value)


# ---- the schedules


def _drawn(stack: Stack) -> Iterator[tuple[str, bytes]]:
    """Yield each scheduled hyperparameter with a picture of its values over the whole run."""
    seen: dict[str, list[Schedule]] = {}
    for position, group in enumerate(stack.param_groups):
        for key, schedule in stack.schedules_of(group).items():
            others = seen.setdefault(key, [])
            if schedule in others:
                continue
            others.append(schedule)
            drawn = _draw(key, schedule, stack.total_steps)
            if drawn is not None:
                yield key if len(others) == 1 else f"{key}/group {group.get('name', position)}", drawn


def _draw(key: str, schedule: Schedule, run: int | None) -> bytes | None:
    """Return a PNG of a schedule, or None if it has no end that is known, or matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    last = run if run is not None else schedule.length(None, None)
    if last is None:
        return None
    curve = schedule.curve(run, run)
    steps = sorted({round(i * (last - 1) / POINTS) for i in range(POINTS + 1)})
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, [curve(step) for step in steps], color="#0072B2")
    axes.set_title(f"{key} = {as_text(schedule)}", fontsize="small", loc="left", wrap=True)
    axes.set_xlabel("update")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


# ---- the dashboard


def _layout(stack: Stack, rates: str) -> Layout:
    """Return the charts of the run: sections that hold nothing for this stack are left out."""
    wrappers = {w.label: w for chain in stack.chains for w in chain.ordered}
    observers = {label: w for label, w in wrappers.items() if w.observes}
    clips = {label: w for label, w in wrappers.items() if "clipped_fraction" in w.measures}
    slow = {label: w for label, w in wrappers.items() if _keeps_slow_weights(w)}
    others = {k: w for k, w in wrappers.items() if k not in {*observers, *clips, *slow}}
    scheduled = dict.fromkeys(k for group in stack.param_groups for k in stack.schedules_of(group) if k != "lr")
    layers: dict[str, Sequence[str]] = {
        f"{label}/{name}": [f"{label}/{name}/.*"] for label, w in observers.items() for name in w.measures
    }
    sections: dict[str, dict[str, Sequence[str]]] = {
        "training": {"loss": ["train/loss", "val/loss", "test/loss"], "gradient norm": ["train/grad_norm"]},
        "rates": {"learning rate": [rates], **{key: [tag_of(key)] for key in scheduled}, **_charts(observers)},
        "clipping": _charts(clips),
        "slow weights": _charts(slow),
        "other parts": _charts(others),
        "layers": layers,
    }
    return {section: charts for section, charts in sections.items() if charts}


def _charts(wrappers: Mapping[str, Wrapper]) -> dict[str, Sequence[str]]:
    return {f"{label}/{name}": [f"{label}/{name}"] for label, w in wrappers.items() for name in w.measures}


def _keeps_slow_weights(wrapper: Wrapper) -> bool:
    return "averaged" in wrapper.implemented_hooks() or any(
        slot.kind in ("anchor", "start") for slot in wrapper.active_slots().values()
    )
