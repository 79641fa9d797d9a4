"""The tab "Stack" of TensorBoard: what a run's optimizer is made of, beside what its parts measure.

Everything comes from the event files, through TensorBoard's data provider, and is sent as JSON: the page puts it on the
screen as text.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import werkzeug
from tensorboard import context, errors, plugin_util
from tensorboard.backend import http_util
from tensorboard.data import provider
from tensorboard.plugins import base_plugin

from metaopt_tensorboard.curves import curves_of, find_rates, flat, owned_tags
from metaopt_tensorboard.descriptions import SPEC, STACK, VERDICTS, Json, introduced, read_run, read_verdicts
from metaopt_tensorboard.log import Log, text_tags

# the first curve of a run
LOSS = "train/loss"
# curves of one part that are sent before somebody asks for all of them
FEW, ALL = 8, 500


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
        wanted = provider.RunTagFilter(tags=text_tags([STACK, SPEC, VERDICTS]))
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

    def runs(self, log: Log, asked: Mapping[str, str]) -> Json:
        """Return the runs that can be shown: what kind each is, and its stack as one line."""
        texts = log.texts(None, [STACK, SPEC, VERDICTS])
        return {"runs": [{"run": run, **introduced(found)} for run, found in sorted(texts.items())]}

    def stack(self, log: Log, asked: Mapping[str, str]) -> Json:
        """Return a run's parts, with hyperparameters and curves; `all` is the label of a part to send all curves of."""
        run = _run(asked)
        texts = log.texts([run], [STACK, SPEC]).get(run, {})
        if not texts:
            raise errors.NotFoundError(f"the run has no {STACK} and no {SPEC}")
        found = read_run(texts)
        parts = list(flat(found["parts"]))
        tags = log.scalar_tags(run)
        find_rates(found["parts"], set(tags))
        owned = [owned_tags(part, tags) for part in parts]
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
            part["curves"], part["more"] = curves_of(few, points, part["label"]), len(its) - len(few)
            del part["measures"]
        for row in rows:
            row["points"] = points.get(row["tag"], [])
        return {
            "run": run,
            **found,
            "curves": curves_of(shown_free, points, ""),
            "more": len(free) - len(shown_free),
            "updates": max((curve[-1][0] for curve in points.values() if curve), default=None),
        }

    def verdicts(self, log: Log, asked: Mapping[str, str]) -> Json:
        """Return the rows of a comparison."""
        run = _run(asked)
        texts = log.texts([run], [VERDICTS]).get(run)
        if not texts:
            raise errors.NotFoundError(f"the run has no {VERDICTS}")
        try:
            return {"run": run, **read_verdicts(texts[VERDICTS])}
        except ValueError as error:
            return {"run": run, "rows": [], "error": str(error)}


def _answering(answer: Any) -> Any:
    """Return the application that answers a request with JSON."""

    @werkzeug.Request.application
    def application(request: werkzeug.Request) -> werkzeug.Response:
        plugin: StackPlugin = answer.__self__
        ctx, experiment = plugin_util.context(request.environ), plugin_util.experiment_id(request.environ)
        return http_util.Respond(request, answer(Log(plugin._data, ctx, experiment), request.args), "application/json")

    return application


def _run(asked: Mapping[str, str]) -> str:
    run = asked.get("run")
    if not run:
        raise errors.InvalidArgumentError("give the name of a run: ?run=NAME")
    return run
