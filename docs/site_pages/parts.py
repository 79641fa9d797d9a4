"""One page for each registered part, from its class and from short runs."""

import inspect
import json
import tempfile
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch

import metaopt
from metaopt.docstrings import links, meanings
from metaopt.registry import Entry, registry
from metaopt.specs.parsing import parse_value
from metaopt.specs.pipeline import part
from metaopt.specs.text import to_text
from site_pages import formula, pictures, runs

KINDS = {
    "optimizer": "Optimizers",
    "wrapper": "Wrappers",
    "schedule": "Schedules",
    "space": "Search spaces",
    "tuner": "Tuners",
    "logger": "Loggers",
    "problem": "Problems",
}
# hyperparameters that one searches so
SPACES = {
    "choice": "adamw(lr=1e-2, betas=(choice(0.9, 0.95), 0.999))",
    "integers": "sgd(lr=0.1) | lookahead(k=integers(2, 20))",
    "log": "adamw(lr=log(1e-4, 1e-1))",
    "uniform": "sgd(lr=0.1) | lookahead(alpha=uniform(0.3, 1))",
}
PLACES = {
    "around": "it owns the evaluation of the loss",
    "on_gradients": "on the gradients, all groups at once, before the base",
    "before_update": "on each group, right before the base updates it",
    "on_update": "on the update that the base has worked out, before the weights move",
    "after_updates": "on all groups at once, after the base",
    "after_update": "on each group, after the base",
    "averaged": "it keeps an average, which `opt.averaged()` shows",
}


# packages of this repository whose loggers have pages too; their modules import what they need when they are used
LOGGERS = ("mlflow", "wandb")
PLUGINS = Path(__file__).parent.parent.parent / "plugins"


def entries() -> list[Entry]:
    """Return the parts that come with metaopt, and the loggers of this repository's plugins."""
    own = [entry for entry in registry.entries() if entry.origin == "metaopt"]
    return sorted([*own, *_loggers()], key=lambda entry: (list(KINDS).index(entry.kind), entry.name))


@cache
def _loggers() -> tuple[Entry, ...]:
    """Return entries made from the modules' own hooks: they need not be installed."""
    found = []
    for name in LOGGERS:
        path = PLUGINS / f"metaopt-{name}" / f"metaopt_{name}.py"
        spec = spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        offered = module.metaopt_loggers()
        found += [Entry(own, "logger", target, f"metaopt-{name}") for own, target in offered.items()]
    return tuple(found)


def pages() -> dict[str, str]:
    """Return the page of every part and the list of them, by path."""
    return {"parts/index.md": _index(), **{f"parts/{entry.name}.md": page(entry) for entry in entries()}}


def navigation() -> list[Any]:
    """Return the entries of the navigation: the parts under their kinds."""
    return [
        {title: [{entry.name: f"parts/{entry.name}.md"} for entry in entries() if entry.kind == kind]}
        for kind, title in KINDS.items()
    ]


def page(entry: Entry) -> str:
    """Return the page of one part."""
    words = [" ".join(paragraph.split()) for paragraph in _paragraphs(entry)]
    cited = list(dict.fromkeys(paper for text in words for paper in formula.papers(text)))
    hyperparameters = _hyperparameters(entry)
    body = [f"# {entry.name}", _kind(entry), *_rule(words, frozenset(hyperparameters))]
    if cited or (entry.kind == "optimizer" and links(entry.target)):
        named = [f"[{name}]({address})" for name, address in cited]
        known = {address for _, address in cited}
        others = links(entry.target) if entry.kind == "optimizer" else []
        named += [f"<{address}>" for address in others if address not in known]
        body.append(f"**Paper:** {', '.join(named)}")
    body += _use(entry)
    if hyperparameters:
        body += ["## Hyperparameters", _table(hyperparameters, meanings(entry.target))]
    if entry.kind in ("optimizer", "wrapper"):
        body += _stack_sections(entry)
    elif entry.kind == "schedule":
        body += ["## Picture", pictures.schedule(entry), "Over a run of 1,000 updates, drawn when this page was built."]
    elif entry.kind == "space":
        body += ["## Values", *_values_of_space(entry)]
    elif entry.kind == "tuner":
        pass
    elif entry.kind == "problem":
        body += ["## Picture", *pictures.problem(entry)]
    else:
        body += _logger_sections(entry)
    return "\n\n".join(text for text in body if text) + "\n"


def _hyperparameters(entry: Entry) -> dict[str, Any]:
    # a logger has arguments, and that of a plugin need not be registered here
    return {} if entry.kind == "logger" else dict(part(entry.name).hyperparameters)


def _paragraphs(entry: Entry) -> list[str]:
    """Return what the class says; of a class of torch's the rule that its plugin notes, and its first sentence."""
    own = (inspect.getdoc(entry.target) or "").split("\n\n")
    notes = [paragraph for note in registry.notes(entry.name) for paragraph in note.split("\n\n")]
    if notes or not entry.target.__module__.startswith(("metaopt.", "metaopt_")):
        return [*notes, own[0]]
    return own


def _kind(entry: Entry) -> str:
    others = registry.known_as(entry)
    called = f" Elsewhere it is called {', '.join(f'`{name}`' for name in others)}." if others else ""
    article = "An" if entry.kind == "optimizer" else "A"
    kind = "search space" if entry.kind == "space" else entry.kind
    if entry.origin != "metaopt":
        return f"{article} {kind} of the package `{entry.origin}`, which is in the folder `plugins/{entry.origin}`."
    return f"{article} {kind} that comes with metaopt.{called}"


def _rule(words: list[str], names: frozenset[str]) -> list[str]:
    first, *others = words
    plain = [formula.without_papers(text).replace(" <- ", " ← ") for text in others]
    plain = [text if text.endswith((".", ":")) else f"{text}." for text in plain if text]
    if not formula.is_formula(first):
        return [f"{formula.without_papers(first)}.", *plain]
    return [f'<div class="rule">\n{formula.typeset(first, names)}\n</div>', *plain]


def _use(entry: Entry) -> list[str]:
    if entry.kind == "problem":
        return ["## Use", f"```sh\nmetaopt train --problem {entry.name} --stack 'adamw(lr=1e-2)'\n```"]
    if entry.kind == "logger":
        return []
    if entry.kind == "tuner":
        return [
            "## Use",
            f"```sh\nmetaopt tune 'adamw(lr=log(1e-4, 1e-1))' --problem digits --method {entry.name}\n```",
        ]
    if entry.kind == "space":
        example = registry.examples(entry.name)[0].spec
        return ["## Use", f"```sh\nmetaopt tune '{SPACES.get(entry.name, f'sgd(lr={example})')}' --problem digits\n```"]
    text = f"sgd(lr={pictures.schedule_text(entry)})" if entry.kind == "schedule" else pictures.spec_of(entry)
    return ["## Use", f'```py\nopt = metaopt.build(\n    model,\n    "{text}",\n    total_steps=1000,\n)\n```']


def _table(hyperparameters: Any, told: dict[str, str]) -> str:
    bounded = any(h.bounds() for h in hyperparameters.values())
    allowed = ("allowed",) if bounded else ()
    rows = [_row("name", "default", *allowed, "meaning"), "|---" * (3 + bounded) + "|"]
    for h in hyperparameters.values():
        default = "required" if h.required else f"`{h.default!r}`"
        others = f" (elsewhere {', '.join(f'`{name}`' for name in h.known_as)})" if h.known_as else ""
        meaning = f"{h.doc or told.get(h.name, '')}{others}"
        rows.append(_row(f"`{h.name}`", default, *((h.bounds(),) if bounded else ()), meaning))
    return "\n".join(rows)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _values_of_space(entry: Entry) -> list[str]:
    """Return the values of a space at the tenths of [0, 1]: each is in the middle of as many others."""
    space = parse_value(registry.examples(entry.name)[0].spec)
    shown = [(f"{tenth / 10:g}", f"`{to_text(space.value(tenth / 10), entry.name)}`") for tenth in range(11)]
    rows = [_row("u", "value"), "|---|---|", *(_row(*cells) for cells in shown)]
    return [
        f"`{to_text(space, entry.name)}` over the numbers u from 0 to 1, of which all are equally likely:",
        "\n".join(rows),
    ]


# ---- what acts in a stack


def _stack_sections(entry: Entry) -> list[str]:
    spec, base = pictures.spec_of(entry), pictures.base_of(entry)
    problem = pictures.problem_for(entry)
    run = runs.train(problem, spec)
    body = []
    if entry.kind == "wrapper":
        hooks = entry.target.implemented_hooks()
        body += ["## Where it acts", "\n".join(f"- `{hook}`: {PLACES[hook]}." for hook in PLACES if hook in hooks)]
    body += ["## State and cost", _state(entry, run), _cost(entry, problem, spec, base, run)]
    body += ["## What it works with", *_works_with(entry, spec)]
    body += ["## Picture", pictures.training(entry, run), pictures.caption(entry)]
    return body


def _state(entry: Entry, run: runs.Run) -> str:
    held = runs.state_of(run)
    if entry.kind == "wrapper":
        held = {key: size for key, size in held.items() if key.partition(".")[0] in _labels(run)}
    rows = ["| state of a parameter | elements, for each element of the parameter |", "|---|---|"]
    for key, size in held.items():
        rows.append(f"| `{key}` | {'no tensor' if size != size else _size(size)} |")
    total = sum(size for size in held.values() if size == size)
    if not held:
        return "It keeps nothing for a parameter."
    return "\n".join([*rows, f"| **together** | **{total:.2f}** |"])


def _labels(run: runs.Run) -> set[str]:
    return {wrapper.label for chain in run.stack.chains for wrapper in (*run.stack.wrappers, *chain.wrappers)}


def _size(size: float) -> str:
    return "1" if abs(size - 1) < 1e-9 else "one number" if size <= 1 / runs.WIDTH**2 + 1e-9 else f"{size:.3g}"


def _cost(entry: Entry, problem: runs.Regression, spec: str, base: str, run: runs.Run) -> str:
    evaluations = f"The loss is evaluated {run.evaluations:.2g} times for an update." if run.evaluations > 1.01 else ""
    try:
        moved = runs.traffic_of(problem, spec)
        if entry.kind == "wrapper":
            moved -= runs.traffic_of(problem, base)
    except Exception:  # what evaluates the loss itself cannot be watched between the two
        return evaluations
    beyond = " beyond what the base moves" if entry.kind == "wrapper" else ""
    return (
        f"An update has to read and write {max(0.0, moved):.1f} times the bytes of the parameters{beyond}, "
        f"counted over 20 updates of `{spec}`. {evaluations}"
    )


def _works_with(entry: Entry, spec: str) -> list[str]:
    example = registry.examples(entry.name)[0]
    rows = ["| tried when this page was built | trains |", "|---|---|"]
    for name, reason in runs.works_with(spec).items():
        cell = "yes" if not reason else "no: " + reason.replace("|", "\\|").replace("<", "&lt;")
        rows.append(f"| {name} | {cell} |")
    body = [f"Three updates of `{spec}`:", "\n".join(rows)]
    if example.expected_failures:
        body.append("It cannot pass these checks of `metaopt check`, for the reasons given:")
        body.append("\n".join(f"- `{check}`: {reason}." for check, reason in example.expected_failures.items()))
    return body


# ---- what writes


def _logger_sections(entry: Entry) -> list[str]:
    if entry.origin != "metaopt":
        given = inspect.signature(entry.target).parameters.values()
        arguments = ", ".join(f"`{argument.name}={argument.default!r}`" for argument in given)
        return [
            "## Use",
            f"```text\npip install -e plugins/{entry.origin}\n```",
            f'```py\nopt = metaopt.build(model, "adamw(lr=1e-3)", log=metaopt.{entry.name}("runs", run="first"))\n```',
            f"Its arguments are {arguments}.",
        ]
    model = runs.Regression().model()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / (f"run.{entry.name}" if entry.name in ("jsonl", "csv") else "run")
        stack = metaopt.build(
            model,
            "clip_grad_norm(1.0) | adamw(lr=0.01, weight_decay=0.0) | lookahead",
            log=entry.target(place),
            log_every=5,
        )
        for inputs, targets in zip(range(10), runs.Regression().batches(), strict=False):
            inputs, targets = targets
            stack.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            loss.backward()
            stack.record(loss=loss.detach())
            stack.step()
        stack.close()
        files = [place] if place.is_file() else sorted(place.rglob("*"))
        body = ["## What it writes", "Ten updates of a small model, `log_every=5`, made when this page was built."]
        if entry.name == "csv":
            return [*body, f"```text\n{place.read_text().rstrip()}\n```"]
        if place.is_file():
            lines = [json.dumps(json.loads(line), indent=None) for line in place.read_text().splitlines()]
            return [*body, "```json\n" + "\n".join(lines) + "\n```"]
        body.append("\n".join(f"- `{file.relative_to(place)}`".replace(_numbers(file), "…") for file in files))
        return [*body, "The tags are:", "\n".join(f"- `{tag}`" for tag in sorted(stack.metrics()))]


def _numbers(file: Path) -> str:
    """Return what differs from run to run in the name of a file of events."""
    return file.name.partition("tfevents.")[2] or "\n"


def _index() -> str:
    lines = ["# Parts", "Every part that comes with metaopt. `metaopt list` shows those of your plugins as well."]
    for kind, title in KINDS.items():
        lines.append(f"## {title}")
        rows = ["| part | what it does |", "|---|---|"]
        for entry in entries():
            if entry.kind == kind:
                said = summary(entry)
                rows.append(f"| [{entry.name}]({entry.name}.md) | {said} |")
        lines.append("\n".join(rows))
    return "\n\n".join(lines) + "\n"


def summary(entry: Entry) -> str:
    """Return what a part does, in one line."""
    text = entry.description if entry.kind == "optimizer" else " ".join(_paragraphs(entry)[0].split())
    text = formula.without_papers(text)
    if formula.is_formula(text):
        names = frozenset(_hyperparameters(entry))
        return (
            formula.typeset(text, names)
            .replace("</p>\n<p>", "; ")
            .removeprefix("<p>")
            .removesuffix("</p>")
            .replace("|", "&#124;")
        )
    return text.replace("|", "\\|") + "."


torch.set_num_threads(1)  # the same numbers on every machine
