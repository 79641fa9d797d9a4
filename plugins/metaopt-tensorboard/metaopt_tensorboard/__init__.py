"""The tab "Stack" of TensorBoard: what a run's optimizer is made of, beside what its parts measure.

Everything comes from the event files, through TensorBoard's data provider, and is sent as JSON: the page puts it on the
screen as text. What a log holds is checked here first: it can be of any program, or damaged.
"""

import ast
import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import werkzeug
from tensorboard import context, errors, plugin_util
from tensorboard.backend import http_util
from tensorboard.data import provider
from tensorboard.plugins import base_plugin

# the text summaries that metaopt writes; the newest point of each counts
STACK, SPEC, VERDICTS = "metaopt/stack", "metaopt/spec", "metaopt/verdicts"
# torch's writer puts this behind the tag of a text
SUFFIX = "/text_summary"
# the first curve of a run, and the curve of a base's rate
LOSS, RATE = "train/loss", "train/learning_rate"
# points of one curve: as many as its width on the screen can show
POINTS = 200
# curves of one part that are sent before somebody asks for all of them
FEW, ALL = 8, 500
# what is read of a log at most: characters of a description, a spec and a value; parts and rows; branches in branches
LONGEST, LONGEST_SPEC, LONGEST_VALUE, MOST, DEEPEST = 2_000_000, 100_000, 2_000, 500, 8

Json = dict[str, Any]


class StackPlugin(base_plugin.TBPlugin):
    """The tab "Stack"."""

    plugin_name = "metaopt_stack"

    def __init__(self, context: base_plugin.TBContext) -> None:
        self._data = context.data_provider

    def get_plugin_apps(self) -> dict[str, Any]:
        """Return what is served below `data/plugin/metaopt_stack`."""
        return {
            "/stack.js": self._serve_module,
            "/runs": _answering(self.runs),
            "/stack": _answering(self.stack),
            "/verdicts": _answering(self.verdicts),
        }

    def is_active(self) -> bool:
        """Return whether there is anything to show."""
        if self._data is None:
            return False
        wanted = provider.RunTagFilter(tags=_written([STACK, SPEC, VERDICTS]))
        return bool(
            self._data.list_tensors(
                context.RequestContext(), experiment_id="", plugin_name="text", run_tag_filter=wanted
            )
        )

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """Return the tab's name and its module."""
        return base_plugin.FrontendMetadata(es_module_path="/stack.js", tab_name="Stack")

    @werkzeug.Request.application
    def _serve_module(self, request: werkzeug.Request) -> werkzeug.Response:
        module = (Path(__file__).parent / "stack.js").read_text(encoding="utf-8")
        return http_util.Respond(request, module, "text/javascript")

    def runs(self, log: "Log", asked: Mapping[str, str]) -> Json:
        """Return the runs that can be shown: what kind each is, and its stack as one line."""
        texts = log.texts(None, [STACK, SPEC, VERDICTS])
        return {"runs": [{"run": run, **_introduced(found)} for run, found in sorted(texts.items())]}

    def stack(self, log: "Log", asked: Mapping[str, str]) -> Json:
        """Return a run's parts, with hyperparameters and curves; `all` is the label of a part to send all curves of."""
        run = _run(asked)
        texts = log.texts([run], [STACK, SPEC]).get(run, {})
        if not texts:
            raise errors.NotFoundError(f"the run has no {STACK} and no {SPEC}")
        found = _read(texts)
        parts = list(_flat(found["parts"]))
        tags = log.scalar_tags(run)
        _find_rates(found["parts"], set(tags))
        owned = [_owned(part, tags) for part in parts]
        rows = [row for part in parts for row in part["hyperparameters"]]
        its_own = {row["tag"] for row in rows}.union(*owned)
        free = sorted((tag for tag in tags if tag not in its_own), key=lambda tag: tag != LOSS)
        shown = [
            its[: ALL if asked.get("all") == part["label"] else FEW] for part, its in zip(parts, owned, strict=True)
        ]
        shown_free = free[: ALL if asked.get("all") == "" else FEW]
        wanted = {*shown_free, *(row["tag"] for row in rows)}.union(*shown)
        points = log.points(run, sorted(wanted.intersection(tags)))
        for part, its, few in zip(parts, owned, shown, strict=True):
            part["curves"], part["more"] = _curves(few, points, part["label"]), len(its) - len(few)
            del part["measures"]
        for row in rows:
            row["points"] = points.get(row["tag"], [])
        return {
            "run": run,
            **found,
            "curves": _curves(shown_free, points, ""),
            "more": len(free) - len(shown_free),
            "updates": max((curve[-1][0] for curve in points.values() if curve), default=None),
        }

    def verdicts(self, log: "Log", asked: Mapping[str, str]) -> Json:
        """Return the rows of a comparison."""
        run = _run(asked)
        texts = log.texts([run], [VERDICTS]).get(run)
        if not texts:
            raise errors.NotFoundError(f"the run has no {VERDICTS}")
        try:
            return {"run": run, **read_verdicts(texts[VERDICTS])}
        except ValueError as error:
            return {"run": run, "rows": [], "error": str(error)}


def _read(texts: Mapping[str, str]) -> Json:
    """Return the parts of a run: as they are described, otherwise as the spec has them."""
    found: Json = {"spec": "", "parts": [], "from": SPEC}
    wrong = []
    for tag, read in ((STACK, read_stack), (SPEC, read_spec)):
        if tag in texts:
            try:
                found = read(texts[tag])
                break
            except ValueError as error:
                wrong.append(str(error))
    return {**found, "error": "; ".join(wrong)}


def _answering(answer: Any) -> Any:
    """Return the application that answers a request with JSON."""

    @werkzeug.Request.application
    def application(request: werkzeug.Request) -> werkzeug.Response:
        plugin: StackPlugin = answer.__self__
        ctx, experiment = plugin_util.context(request.environ), plugin_util.experiment_id(request.environ)
        return http_util.Respond(request, answer(Log(plugin._data, ctx, experiment), request.args), "application/json")

    return application


def _written(tags: Sequence[str]) -> list[str]:
    return [*tags, *(f"{tag}{SUFFIX}" for tag in tags)]


def _run(asked: Mapping[str, str]) -> str:
    run = asked.get("run")
    if not run:
        raise errors.InvalidArgumentError("give the name of a run: ?run=NAME")
    return run


class Log:
    """The event files as TensorBoard has read them, for one request."""

    def __init__(self, data: provider.DataProvider, ctx: Any, experiment: str) -> None:
        self._data = data
        self._of: Json = {"ctx": ctx, "experiment_id": experiment}

    def texts(self, runs: Sequence[str] | None, tags: Sequence[str]) -> dict[str, dict[str, str]]:
        """Return the newest text of each run and tag."""
        wanted = provider.RunTagFilter(runs=runs, tags=_written(tags))
        found = self._data.read_tensors(**self._of, plugin_name="text", run_tag_filter=wanted, downsample=1)
        return {
            run: {tag.removesuffix(SUFFIX): _text(points[-1].numpy) for tag, points in its.items() if points}
            for run, its in found.items()
            if any(its.values())
        }

    def scalar_tags(self, run: str) -> list[str]:
        """Return the tags of a run's scalars, in order."""
        wanted = provider.RunTagFilter(runs=[run])
        found = self._data.list_scalars(**self._of, plugin_name="scalars", run_tag_filter=wanted)
        return sorted(found.get(run, {}), key=_natural)

    def points(self, run: str, tags: Sequence[str]) -> dict[str, list[list[float]]]:
        """Return some points of each curve, the last among them."""
        if not tags:
            return {}
        wanted = provider.RunTagFilter(runs=[run], tags=tags)
        found = self._data.read_scalars(**self._of, plugin_name="scalars", run_tag_filter=wanted, downsample=POINTS)
        return {tag: [[point.step, point.value] for point in its] for tag, its in found.get(run, {}).items()}


def read_stack(text: str) -> Json:
    """Return what a `metaopt/stack` says, in the form that the page takes. Raises ValueError."""
    data = _json(text, STACK)
    branches = data.get("branches")
    parts = _parts(data.get("parts"), 0)
    if branches:  # at the top: those of the part that deals parameters out
        own = {"name": "partition", "kind": "optimizer", "branches": branches}
        parts.append(_part(own, 0))
    return {"spec": _one_line(_value(data.get("spec", ""))), "parts": parts, "from": STACK}


def _parts(given: Any, depth: int) -> list[Json]:
    if not isinstance(given, list) or not all(isinstance(part, dict) for part in given):
        raise ValueError(f"{STACK}: parts must be a list of objects")
    if depth > DEEPEST or len(given) > MOST:
        raise ValueError(f"{STACK}: at most {MOST} parts and {DEEPEST} branches inside one another are shown")
    return [_part(part, depth) for part in given]


def _part(given: Json, depth: int) -> Json:
    constants, scheduled, tags = (_dict(given.get(key)) for key in ("hyperparameters", "scheduled", "values"))
    name = _value(given.get("name", "?"))
    kind = _value(given.get("kind", ""))
    if kind == "optimizer":
        tags.setdefault("lr", RATE)
    written = given.get("given")
    rows = [
        {
            "name": key,
            "value": _value(constants[key]) if key in constants else "",
            "schedule": _value(scheduled[key]) if key in scheduled else "",
            "default": isinstance(written, list) and key not in written,
            "tag": tags[key] if isinstance(tags.get(key), str) else "",
        }
        for key in dict.fromkeys((*scheduled, *constants))
    ]
    measures = given.get("measures")
    branches = given.get("branches")
    if isinstance(branches, dict):
        branches = [{"pattern": pattern, "parts": parts} for pattern, parts in branches.items()]
    return {
        "name": name,
        "label": _value(given.get("label") or name),
        "kind": kind,
        "acts_on": _value(given.get("acts_on", "")),
        "hyperparameters": rows,
        "measures": [tag for tag in measures if isinstance(tag, str)] if isinstance(measures, list) else [],
        "branches": [
            {"pattern": _value(branch.get("pattern", "")), "parts": _parts(branch.get("parts"), depth + 1)}
            for branch in (branches if isinstance(branches, list) else [])
            if isinstance(branch, dict)
        ],
    }


def read_spec(text: str) -> Json:
    """Return what can be said of a run that has only its spec: nothing of it is executed. Raises ValueError."""
    line = _one_line(text)
    try:
        if len(line) > LONGEST_SPEC:
            raise ValueError
        tree = ast.parse(line, mode="eval").body
        parts = [_called(node) for node in _piped(tree)]
    except (SyntaxError, RecursionError, MemoryError, ValueError):
        raise ValueError(f"{SPEC} cannot be read as a spec") from None
    return {"spec": line, "parts": parts, "from": SPEC}


def _piped(tree: ast.expr) -> list[ast.expr]:
    """Return the parts of `a | b | c`."""
    found: list[ast.expr] = []
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr):
        found.append(tree.right)
        tree = tree.left
    return [tree, *reversed(found)]


def _called(node: ast.expr) -> Json:
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    given = {keyword.arg or "**": keyword.value for keyword in call.keywords}
    given.update({f"{number}": value for number, value in enumerate(call.args, 1)})
    name = ast.unparse(call.func)
    # a part that deals parameters out takes pipelines by pattern
    branches = [
        {"pattern": ast.unparse(key).strip("'\""), "parts": [_called(part) for part in _piped(value)]}
        for dealt in given.values()
        if isinstance(dealt, ast.Dict)
        for key, value in zip(dealt.keys, dealt.values, strict=True)
        if key is not None
    ]
    label = given.pop("label", None)
    texts = {key: ast.unparse(value) for key, value in given.items() if not isinstance(value, ast.Dict)}
    # the one hyperparameter whose tag is known without a description
    rate = {"lr": RATE} if "lr" in texts else {}
    shown = label.value if isinstance(label, ast.Constant) else name.rpartition(".")[2]
    own = {"name": name, "label": shown, "hyperparameters": texts, "values": rate}
    return {**_part(own, 0), "branches": branches}


def read_verdicts(text: str) -> Json:
    """Return what a `metaopt/verdicts` says, in the form that the page takes. Raises ValueError."""
    data = _json(text, VERDICTS)
    rows = data.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{VERDICTS}: rows must be a list of objects")
    if len(rows) > MOST:
        raise ValueError(f"{VERDICTS}: at most {MOST} rows are shown")
    words, numbers = ("contender", "verdict"), ("difference", "low", "high", "p")
    return {
        "baseline": _value(data.get("baseline", "")),
        "metric": _value(data.get("metric", "")),
        "level": _number(data.get("level")),
        "rows": [
            {**{key: _value(row.get(key, "")) for key in words}, **{key: _number(row.get(key)) for key in numbers}}
            for row in rows
        ],
    }


def _introduced(texts: Mapping[str, str]) -> Json:
    """Return the kind of a run, and its stack as one line, from its texts."""
    spec = texts.get(SPEC, "")
    if STACK in texts:
        with contextlib.suppress(ValueError):  # it is shown with the run itself
            spec = read_stack(texts[STACK])["spec"] or spec
    has = {"comparison": VERDICTS in texts, "stack": STACK in texts or SPEC in texts}
    return {"kinds": [kind for kind, there in has.items() if there], "spec": _one_line(spec)[:LONGEST_VALUE]}


def _flat(parts: Sequence[Json]) -> Iterator[Json]:
    """Return the parts and those of their branches."""
    for part in parts:
        yield part
        for branch in part["branches"]:
            yield from _flat(branch["parts"])


def _find_rates(parts: Sequence[Json], tags: set[str], branch: str | None = None) -> None:
    """Give a base that has the parameters of a branch the rate that is logged for these."""
    own = f"{RATE}/group {branch}"
    for part in parts:
        if part["branches"]:  # each has bases of its own
            part["measures"] = [tag for tag in part["measures"] if tag != RATE]
        for row in part["hyperparameters"]:
            if row["tag"] == RATE and own in tags:
                row["tag"] = own
                part["measures"] = [tag for tag in part["measures"] if tag != RATE]
        for inner in part["branches"]:
            _find_rates(inner["parts"], tags, inner["pattern"])


def _owned(part: Json, tags: Sequence[str]) -> list[str]:
    """Return the tags of what a part measures: those that it names, those below them, and those that bear its label."""
    named = {*part["measures"], part["label"]}
    drawn = {row["tag"] for row in part["hyperparameters"]}
    ways = {tag: [tag[: slash.start()] for slash in re.finditer("/", tag)] for tag in tags}
    return [tag for tag in tags if tag not in drawn and (tag in part["measures"] or not named.isdisjoint(ways[tag]))]


def _natural(tag: str) -> list[tuple[int, str]]:
    """Return what sorts `layer 2` before `layer 10`."""
    return [(int(word) if word.isdecimal() else -1, word) for word in re.split(r"(\d{1,18})", tag)]


def _curves(tags: Sequence[str], points: Mapping[str, list[list[float]]], label: str) -> list[Json]:
    return [{"tag": tag, "name": tag.removeprefix(f"{label}/"), "points": points.get(tag, [])} for tag in tags]


def _json(text: str, tag: str) -> Json:
    if len(text) > LONGEST:
        raise ValueError(f"{tag} has {len(text)} characters, at most {LONGEST} are read")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{tag} is not JSON") from None
    if not isinstance(data, dict):
        raise ValueError(f"{tag} must be a JSON object, got {type(data).__name__}")
    return data


def _text(array: Any) -> str:
    """Return the first string of a text summary, which may have any shape."""
    flat = array.reshape(-1)
    first = flat[0] if flat.size else ""
    return first.decode("utf-8", "replace") if isinstance(first, bytes) else str(first)


def _one_line(text: str) -> str:
    """Return the first line that says something; Markdown's indentation of code goes."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _dict(value: Any) -> Json:
    return dict(list(value.items())[:MOST]) if isinstance(value, dict) else {}


def _value(value: Any) -> str:
    """Return a value as text, as a spec writes it; JSON has lists where a spec has tuples."""
    text = value if isinstance(value, str) else repr(tuple(value) if isinstance(value, list) else value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _number(value: Any) -> float | None:
    """Return a number, also one that is written as text (JSON has no infinity), or None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number
