"""Weights & Biases: the run of a stack in W&B's own files, which `wandb sync` uploads."""

import io
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaopt import Histogram, LogError, Logger, Table, hookimpl

if TYPE_CHECKING:
    from wandb import Run

# what charts have on their x-axis: W&B's own step only counts, and takes no earlier one
UPDATE = "update"


class WandB(Logger):
    """Writes a run of Weights & Biases: scalars over `update`, histograms, images, tables and the configuration.

    `place` is the folder in which W&B makes its folder `wandb` (by default `WANDB_DIR` or the current one), or a run of
    yours, such as `wandb.run`, which you finish yourself. `run` is the name of the run, `project` is by default
    `WANDB_PROJECT` or "metaopt"; `WANDB_ENTITY` and the other settings of W&B hold. `mode` is "online", "offline" or
    "disabled"; without it `WANDB_MODE` holds, or else the run is online where there is a login and offline where not.

    A run that goes on from a checkpoint goes on under the same id: what was written is noted in `wandb/metaopt`, beside
    the runs. W&B cannot delete points: those after the checkpoint stay, a point that has the same values again is not
    written twice, and one that differs is written beside the old one. Offline, W&B makes a folder for each part of such
    a run; `wandb sync` puts them together. Texts are tables of one cell. Raises LogError if W&B cannot write.
    """

    def __init__(
        self,
        place: "str | os.PathLike[str] | Run | None" = None,
        run: str = "metaopt",
        project: str | None = None,
        mode: str | None = None,
    ) -> None:
        if find_spec("wandb") is None:
            raise LogError("the logger wandb needs wandb, which is not installed: pip install wandb")
        if mode not in (None, "online", "offline", "disabled"):
            raise LogError(f"mode must be 'online', 'offline', 'disabled' or None, got {mode!r}")
        self.run, self.mode = run, mode
        self.project = project or os.environ.get("WANDB_PROJECT") or "metaopt"
        self._run: Any = None
        self._foreign = False
        self._axes: set[str] = set()
        if place is None or isinstance(place, str | os.PathLike):
            self.directory = Path(place or os.environ.get("WANDB_DIR") or ".").resolve()
            name = re.sub(r"[^\w.\-]", lambda found: f"_{ord(found[0]):x}_", f"{self.project}-{run}")
            self._points = _Points(self.directory / "wandb" / "metaopt" / f"{name}.jsonl")
            self.place = f"{self.directory}, {self.project}/{run}"
        elif hasattr(place, "log") and hasattr(place, "id"):
            self._run, self._foreign = place, True
            self.directory = Path(place.dir).parent
            self._points = _Points(self.directory / "metaopt.jsonl")
            self.place = f"{self.directory}, run {place.id}"
        else:
            raise LogError(f"place must be a directory, a run of wandb or None, got {place!r:.60}")

    def open(
        self, *, step: int, tags: Sequence[str], spec: str, hparams: Mapping[str, bool | int | float | str]
    ) -> None:
        """Begin a run, or go on after `step` updates with the one of this name."""
        config = {"stack": spec, **hparams} if spec else dict(hparams)
        with self._writing("the beginning of the run"):
            goes_on = step > 0 or self._run is not None
            identity = self._points.read(step) if goes_on else None
            if self._run is None:
                identity = identity or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
                self.directory.mkdir(parents=True, exist_ok=True)
                self._run = self._begun(identity, config)
            elif self._foreign:
                self._run.config.update(config, allow_val_change=True)
            self._points.begin(self._run.id, anew=not goes_on)
            self._show(["train/", *tags])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write one point; what the run holds already is left out."""
        with self._writing(f"update {step}"):
            new = self._points.new(step, values)
            if new:
                self._show(new)
                self._run.log({UPDATE: step, **new})
                self._points.note(step, new)

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """Write each as a histogram of W&B; neighbouring bins are joined where it takes no more."""
        import wandb

        self._log(step, {tag: _histogram(wandb, histogram) for tag, histogram in values.items()})

    def texts(self, step: int, values: Mapping[str, str]) -> None:
        """Write each text as a table of one cell."""
        self.tables(step, {tag: Table(("text",), ((text,),)) for tag, text in values.items()})

    def images(self, step: int, values: Mapping[str, bytes]) -> None:
        """Write each as an image of W&B."""
        import wandb
        from PIL import Image

        self._log(step, {tag: wandb.Image(Image.open(io.BytesIO(png))) for tag, png in values.items()})

    def tables(self, step: int, values: Mapping[str, Table]) -> None:
        """Write each as a table of W&B."""
        import wandb

        def made(table: Table) -> Any:
            return wandb.Table(list(table.columns), [list(row) for row in table.rows], allow_mixed_types=True)

        self._log(step, {tag: made(table) for tag, table in values.items()})

    def close(self) -> None:
        """Finish the run; a run of the caller's goes on."""
        run, self._run = self._run, self._run if self._foreign else None
        if run is not None and not self._foreign:
            with self._writing("the end of the run"):
                run.finish()

    # ---- the run

    def _begun(self, identity: str, config: Mapping[str, Any]) -> Any:
        import wandb

        return wandb.init(
            project=self.project,
            name=self.run,
            id=identity,
            resume="allow",
            dir=self.directory,
            config=dict(config),
            notes=str(config.get("stack", "")),
            mode=self.mode or _default_mode(wandb),
            reinit="create_new",  # runs of the caller's go on beside this one
        )

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        with self._writing(f"update {step}"):
            self._show(values)
            self._run.log({UPDATE: step, **values})

    def _show(self, tags: Sequence[str] | Mapping[str, Any]) -> None:
        """Have W&B draw these tags, and those beside them, over the updates."""
        for tag in tags:
            first, slash, _ = tag.partition("/")
            axis = f"{first}/*" if slash else tag
            if axis not in self._axes:
                self._axes.add(axis)
                self._run.define_metric(axis, step_metric=UPDATE)

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Turn whatever W&B raises into a LogError."""
        try:
            yield
        except LogError:
            raise
        except Exception as error:  # also that of a server
            reason = " ".join(str(error).split())
            raise LogError(f"cannot write {what} to wandb ({self.directory}): {reason:.400}") from error


class _Points:
    """What was written to a run, as JSON lines: its id, then each point. Offline, W&B itself cannot be asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._later: dict[tuple[int, str], float] = {}

    def read(self, step: int) -> str | None:
        """Return the id of the run, or None if there is none; know the points after `step`."""
        self._later.clear()
        identity = None
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:  # cut off
                continue
            if "id" in entry:
                identity = str(entry["id"])
            elif entry[UPDATE] > step:
                self._later.update({(entry[UPDATE], tag): value for tag, value in entry["values"].items()})
        return identity

    def begin(self, identity: str, *, anew: bool) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if anew:
            self._later.clear()
            self.path.write_text("", encoding="utf-8")
        self._append({"id": identity})

    def new(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Return those values that the run does not hold."""
        # as text, because nan differs from itself
        held = {tag: repr(self._later.get((step, tag))) for tag in values}
        return {tag: value for tag, value in values.items() if held[tag] != repr(value)}

    def note(self, step: int, values: Mapping[str, float]) -> None:
        self._append({UPDATE: step, "values": dict(values)})

    def _append(self, entry: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            # a line of its own also where a killed process left half a line
            file.write("\n" * ("id" in entry) + json.dumps(entry) + "\n")


def _default_mode(wandb: Any) -> str | None:
    """Return None where W&B's settings decide, "offline" where nobody is logged in: nothing asks, nothing fails."""
    if "WANDB_MODE" in os.environ or wandb.run is not None:
        return None
    return None if wandb.login(prompt=False, verify=False) else "offline"


def _histogram(wandb: Any, histogram: Histogram) -> Any:
    edges, counts = list(histogram.edges), list(histogram.counts)
    while len(counts) > wandb.Histogram.MAX_LENGTH:
        counts = [sum(counts[i : i + 2]) for i in range(0, len(counts), 2)]
        edges = [*edges[:-1:2], edges[-1]]
    return wandb.Histogram(np_histogram=(counts, edges))


@hookimpl
def metaopt_loggers() -> dict[str, type[Logger]]:
    return {"wandb": WandB}
