"""MLflow: the run of a stack in a tracking store, shown by `mlflow ui`."""

import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaopt import Histogram, LogError, Logger, Table, hookimpl

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# what MLflow takes: entries of a request, characters of a name, of a parameter's value and of a tag's
METRICS, PARAMS = 1000, 100
NAME, PATH, PARAM, TAG = 250, 150, 6000, 8000
URI = re.compile(r"[a-z][a-z0-9+.\-]+:/|databricks$")
# the runs that a later run may go on with carry this tag
OWN = "metaopt"
DESCRIPTION, ARTIFACTS = "mlflow.note.content", "mlflow.loggedArtifacts"


class MLflow(Logger):
    """Writes a run of MLflow: metrics at x = update, parameters, the spec as description, and artifacts.

    `place` is a tracking URI, or a directory for an SQLite store (`mlflow.db`) and its artifacts, or a run of yours,
    such as `mlflow.active_run()`, which you end yourself. Without it MLflow's settings hold: `MLFLOW_TRACKING_URI`,
    `mlflow.set_tracking_uri`, otherwise `mlflow.db` in the current folder. `experiment` is by default
    `MLFLOW_EXPERIMENT_NAME` or "metaopt".

    A run that goes on from a checkpoint goes on in the newest run of the name `run`. MLflow cannot delete points: those
    after the checkpoint stay, a point that has the same value again is not written twice, and one that differs is
    written beside the old one. Texts, tables and images are artifacts of MLflow's own kinds. MLflow has no histograms:
    each is a JSON file with edges and counts below `histograms`. Raises LogError if MLflow cannot write.
    """

    def __init__(
        self,
        place: "str | os.PathLike[str] | Run | None" = None,
        run: str = "metaopt",
        experiment: str | None = None,
    ) -> None:
        if find_spec("mlflow") is None:
            raise LogError("the logger mlflow needs mlflow-skinny, which is not installed: pip install mlflow-skinny")
        if not run or {"'", '"', "`"} & set(run):
            raise LogError(f"run must be a name without quotes, got {run!r}")
        self.run = run
        self.experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "metaopt"
        self._directory: Path | None = None
        self._id: str | None = None
        self._client: MlflowClient | None = None
        self._later: dict[tuple[str, int], float] = {}  # points of the run that are later than where it goes on
        self._foreign = hasattr(getattr(place, "info", None), "run_id")
        self._open = False
        if self._foreign:
            self._id = place.info.run_id  # type: ignore[union-attr]
            self.uri = _own_uri()
        elif place is None:
            self.uri = _own_uri()
        elif isinstance(place, str) and URI.match(place):
            self.uri = place
        elif isinstance(place, str | os.PathLike):
            self._directory = Path(place).resolve()
            self.uri = f"sqlite:///{self._directory / 'mlflow.db'}"
        else:
            raise LogError(f"place must be a tracking URI, a directory, a run of MLflow or None, got {place!r:.60}")
        self.place = f"{self.uri}, run {self._id}" if self._foreign else f"{self.uri}, {self.experiment}/{run}"

    def open(
        self, *, step: int, tags: Sequence[str], spec: str, hparams: Mapping[str, bool | int | float | str]
    ) -> None:
        """Begin a run, or go on after `step` updates with the newest one of this name."""
        with self._writing("the beginning of the run"):
            client = self._made()
            experiment = None if self._id is not None else self._experiment(client)
            if experiment is not None and step > 0:
                self._id = self._newest(client, experiment)
            if self._id is None:
                self._id = client.create_run(experiment, run_name=self.run, tags={OWN: "stack"}).info.run_id
            self._later = self._points_after(client, step)
            if not self._foreign:
                client.update_run(self._id, status="RUNNING")
            self._describe(client, spec, hparams)
            self._open = True

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write one metric per tag; one that the run holds already is left out."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        named = {_metric(tag): value for tag, value in values.items()}
        new = [Metric(key, value, now, step) for key, value in named.items() if not self._holds(key, step, value)]
        with self._writing(f"update {step}"):
            for first in range(0, len(new), METRICS):
                self._made().log_batch(self._id, metrics=new[first : first + METRICS], synchronous=True)

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """Write each histogram as a JSON file."""
        with self._writing(f"update {step}"):
            for tag, histogram in values.items():
                numbers = {"edges": list(histogram.edges), "counts": list(histogram.counts)}
                path = f"histograms/{_path(tag)}/{step:09d}.json"
                self._made().log_dict(self._id, numbers, path)

    def texts(self, step: int, values: Mapping[str, str]) -> None:
        """Write each text as a Markdown file, or as a JSON file if it is JSON; a later one takes its place."""
        with self._writing(f"the texts of update {step}"):
            for tag, text in values.items():
                self._made().log_text(self._id, text, f"{_path(tag)}.{'json' if _is_json(text) else 'md'}")

    def images(self, step: int, values: Mapping[str, bytes]) -> None:
        """Write each image, with its step, for the page of images."""
        from PIL import Image

        with self._writing(f"the images of update {step}"):
            for tag, png in values.items():
                image = Image.open(io.BytesIO(png))
                self._made().log_image(self._id, image, key=_path(tag), step=step, synchronous=True)

    def tables(self, step: int, values: Mapping[str, Table]) -> None:
        """Write each table as MLflow's `log_table` does, which needs pandas; `load_table` reads it."""
        with self._writing(f"the tables of update {step}"):
            client = self._made()
            listed = json.loads(client.get_run(self._id).data.tags.get(ARTIFACTS, "[]"))
            for tag, table in values.items():
                entry = {"path": f"{_path(tag)}.json", "type": "table"}
                rows = [[_cell(value) for value in row] for row in table.rows]
                client.log_dict(self._id, {"columns": list(table.columns), "data": rows}, entry["path"])
                if entry not in listed:
                    listed.append(entry)
            client.set_tag(self._id, ARTIFACTS, json.dumps(listed))

    def close(self) -> None:
        """End the run as finished; a run of the caller's stays open."""
        if self._open and not self._foreign:
            with self._writing("the end of the run"):
                self._made().set_terminated(self._id)
            self._id = None
        self._open = False

    # ---- the run

    def _made(self) -> Any:
        """Return the client, made when it is first needed: only the rank that writes needs a store."""
        if self._client is None:
            from mlflow import MlflowClient

            if self._directory is not None:
                self._directory.mkdir(parents=True, exist_ok=True)
            self._client = MlflowClient(tracking_uri=self.uri)
        return self._client

    def _experiment(self, client: Any) -> str:
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            artifacts = None if self._directory is None else (self._directory / "artifacts").as_uri()
            try:
                return str(client.create_experiment(self.experiment, artifact_location=artifacts))
            except Exception:
                # another process may have made it since
                found = client.get_experiment_by_name(self.experiment)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _newest(self, client: Any, experiment: str) -> str | None:
        query = f"attributes.run_name = '{self.run}' and tags.{OWN} = 'stack'"
        runs = client.search_runs([experiment], query, order_by=["attributes.start_time DESC"], max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def _describe(self, client: Any, spec: str, hparams: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        # MLflow refuses another value of a parameter: those of a run that goes on stay
        data = client.get_run(self._id).data
        values = {_metric(name): str(value)[:PARAM] for name, value in {"stack": spec, **hparams}.items()}
        params = [Param(name, value) for name, value in values.items() if value and name not in data.params]
        for first in range(0, len(params), PARAMS):
            client.log_batch(self._id, params=params[first : first + PARAMS], synchronous=True)
        if spec and DESCRIPTION not in data.tags:
            client.set_tag(self._id, DESCRIPTION, f"```\n{spec}\n```"[:TAG])

    def _points_after(self, client: Any, step: int) -> dict[tuple[str, int], float]:
        points = {}
        for key in client.get_run(self._id).data.metrics:
            for point in client.get_metric_history(self._id, key):
                if point.step > step:
                    points[key, point.step] = point.value
        return points

    def _holds(self, key: str, step: int, value: float) -> bool:
        held = self._later.get((key, step))
        if held is None or math.isnan(value):
            return held is not None and math.isnan(held)
        return _finite(held) == _finite(value)

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Turn whatever MLflow raises into a LogError."""
        try:
            yield
        except LogError:
            raise
        except Exception as error:  # also that of a database or of a server
            reason = " ".join(str(error).split())
            raise LogError(f"cannot write {what} to MLflow ({self.uri}): {reason:.400}") from error


def _own_uri() -> str:
    """Return where MLflow writes, by its own settings, without importing it if they are in the environment."""
    if "mlflow" not in sys.modules and (uri := os.environ.get("MLFLOW_TRACKING_URI")):
        return uri
    import mlflow

    return str(mlflow.get_tracking_uri())


def _metric(tag: str) -> str:
    """Return a tag as the name of a metric or a parameter."""
    return _name(tag, r"\w.\- :", NAME)


def _path(tag: str) -> str:
    """Return a tag as the path of an artifact."""
    return _name(tag, r"A-Za-z0-9_.\- ", PATH)


def _name(tag: str, allowed: str, longest: int) -> str:
    """Return a tag as a name that MLflow takes; other characters are written as their codes, such as `_2a_` for `*`."""
    parts = [re.sub(f"[^{allowed}]", lambda found: f"_{ord(found[0]):x}_", part) for part in tag.split("/")]
    # an empty part, "." and ".." would make another path
    name = "/".join(part if part.strip(".") else f"_{len(part)}_" for part in parts)
    return name if len(name) <= longest else f"{name[: longest - 9]}_{sha256(tag.encode()).hexdigest()[:8]}"


def _finite(value: float) -> float:
    """Return what a database holds for a value: the largest number for an infinity."""
    return math.copysign(sys.float_info.max, value) if math.isinf(value) else value


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _cell(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@hookimpl
def metaopt_loggers() -> dict[str, type[Logger]]:
    return {"mlflow": MLflow}
