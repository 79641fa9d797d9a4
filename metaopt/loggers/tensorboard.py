"""TensorBoard: `tensorboard --logdir runs` shows what is written here."""

import io
import itertools
import os
import socket
import struct
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaopt import Histogram, Layout, LogError, Logger, Margin, MissingExtra, hookimpl, warn

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard(Logger):
    """Writes TensorBoard event files: scalars, the spec as text and one HParams record, all in the run's directory.

    `log` is a directory, which is made, or a SummaryWriter, which stays its owner's: its `purge_step` and its
    `close()` too. Raises LogError where the directory cannot be written, or where another writer has event files:
    TensorBoard follows one writer per directory, and would hide points of the other.
    """

    def __init__(self, log: "str | os.PathLike[str] | SummaryWriter") -> None:
        if find_spec("tensorboard") is None:
            raise MissingExtra("the log of TensorBoard", "tensorboard", "tensorboard")
        self._file: _EventFile | None = None
        self._writer: Any = None
        self._described = False
        self._names: set[str] = set()  # of event files that were looked at
        if isinstance(log, str | os.PathLike):
            self.directory = _writable(Path(log))
            self._refuse_another_writer()
        else:
            self._writer = log
            self.directory = Path(log.log_dir)
        self.place = self.directory.resolve()

    def open(
        self, *, step: int, tags: Sequence[str], spec: str, hparams: Mapping[str, bool | int | float | str]
    ) -> None:
        """Begin the run, or go on after `step` updates; TensorBoard then shows no older point of a later step."""
        earlier = False if self._writer is not None else self._open_own(step)
        if not self._described and not (earlier and step > 0):
            # once per run: what went on in the same directory has its record there already
            self._write(0, _described(spec, hparams))
        self._described = True

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write one point per tag at x = `step`, to the disk."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._writer is None and (found := self._of_another_writer()):
            warn(
                f"another writer has begun to write to {self.directory} ({found}): TensorBoard follows one writer per "
                f"directory, and shows no more points of this run. Give log a directory of its own, or that writer",
            )
        self._write(step, [Summary(value=[Summary.Value(tag=tag, simple_value=v)]) for tag, v in values.items()])

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """Write histograms for the pages "Histograms" and "Distributions"."""
        self._write(step, [_histogram(tag, histogram) for tag, histogram in values.items()])

    def texts(self, step: int, values: Mapping[str, str]) -> None:
        """Write texts for the page "Text"."""
        from torch.utils.tensorboard.summary import text

        self._write(step, [text(tag, value) for tag, value in values.items()])  # type: ignore[no-untyped-call]

    def images(self, step: int, values: Mapping[str, bytes]) -> None:
        """Write images for the page "Images"."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        summaries = []
        for tag, png in values.items():
            width, height = struct.unpack(">II", png[16:24])  # of the first chunk of a PNG
            image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
            summaries.append(Summary(value=[Summary.Value(tag=tag, image=image)]))
        self._write(step, summaries)

    def layout(self, panels: Layout) -> None:
        """Arrange the charts of the page "Custom Scalars"."""
        from torch.utils.tensorboard.summary import custom_scalars

        charts = {
            section: {
                title: ["Margin", list(tags)] if isinstance(tags, Margin) else ["Multiline", list(tags)]
                for title, tags in titles.items()
            }
            for section, titles in panels.items()
        }
        self._write(0, [custom_scalars(charts)])  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Close the event file; a SummaryWriter that was given is only flushed."""
        if self._writer is not None:
            if self.directory.is_dir():
                self._writer.flush()
            return
        file, self._file = self._file, None
        if file is None or file.failed:
            return
        # only a run that was closed is shown as finished
        file.write(0, [_records({})[2]])
        file.close()

    def _write(self, step: int, summaries: Sequence[Any]) -> None:
        if self._file is not None:
            self._file.write(step, summaries)
            return
        # the writer's thread would die of this with a traceback of its own, and a later write would only hint at it
        if not self.directory.is_dir():
            raise LogError(f"the log directory {self.directory} has disappeared: update {step} cannot be written there")
        try:
            # opens a writer that its owner closed again, as its own add_scalar does
            file = self._writer._get_file_writer()
            for summary in summaries:
                file.add_summary(summary, step)
            self._writer.flush()
        except OSError as error:
            raise LogError(f"cannot write update {step} to {self.directory}: {error}") from error

    def _open_own(self, step: int) -> bool:
        """Open a new event file that hides what earlier ones hold after `step`; return whether there are any."""
        if self._file is not None:
            self._file.close()
        earlier = bool(_wait_for_a_later_name(_writable(self.directory)))
        self._refuse_another_writer()
        # the axis "relative" shows the time that the run took, without the pause in front of a resume
        last = _last_time(self.directory, step) if step > 0 else None
        self._file = _EventFile(self.directory, 0.0 if last is None else max(0.0, time.time() - last))
        self._names.add(self._file.name)
        # also where nothing is earlier: TensorBoard takes the first such mark for the start and obeys the second
        self._file.begin(step + 1)
        return earlier

    def _refuse_another_writer(self) -> None:
        if found := self._of_another_writer():
            raise LogError(
                f"{self.directory} has event files of another writer ({found}), whose points TensorBoard would hide: "
                f"give log a directory of its own, such as {self.directory / 'metaopt'}, or that SummaryWriter itself"
            )

    def _of_another_writer(self) -> str | None:
        """Return the name of an event file that is new and not of a stack."""
        new = {path.name for path in self.directory.glob("*tfevents*")} - self._names
        owners = {name: _is_own(self.directory / name) for name in sorted(new)}
        self._names |= {name for name, own in owners.items() if own is not None}
        return next((name for name, own in owners.items() if own is False), None)


def _is_own(path: Path) -> bool | None:
    """Return whether an event file begins as a stack's does, or None if nothing is in it yet.

    First there is a version, then the start of a session.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    records: list[bytes] = []
    try:
        with path.open("rb") as file:
            # a record: its length in 8 bytes, a checksum in 4, the content, a checksum in 4
            while len(records) < 2 and len(header := file.read(12)) == 12:
                records.append(file.read(struct.unpack("<Q", header[:8])[0]))
                file.read(4)
        if not records:
            return None
        status: int = Event.FromString(records[1]).session_log.status if len(records) == 2 else 0
    except (OSError, DecodeError):
        return False
    return bool(status == SessionLog.START)


def _last_time(directory: Path, step: int) -> float | None:
    """Return when the last point up to `step` was written, on the clock of the run; None if there is none."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    times: dict[int, float] = {}
    for path in sorted(directory.glob("events.out.tfevents.*")):
        with suppress(OSError, DecodeError, struct.error), path.open("rb") as file:
            while len(header := file.read(12)) == 12:
                event = Event.FromString(file.read(struct.unpack("<Q", header[:8])[0]))
                file.read(4)
                if event.HasField("summary") and 0 < event.step <= step:
                    times[event.step] = event.wall_time  # of a later file, if the run went back
    return times[max(times)] if times else None


class _EventFile:
    """One event file, written by the thread that logs: an error of the disk is raised there, and nowhere else."""

    _numbers = itertools.count()

    def __init__(self, directory: Path, pause: float = 0.0) -> None:
        self._pause = pause
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(self._numbers)}"
        self.name = name
        self._path = directory / name
        self.failed = False
        try:
            self._file = self._path.open("xb")
        except OSError as error:
            raise LogError(f"cannot write to the log directory {directory}: {error.strerror or error}") from error

    def begin(self, step: int) -> None:
        """Mark a session that begins with `step`: points of it or later, in older files, are not shown."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        version = Event(wall_time=self._now(), file_version="brain.Event:2")
        start = Event(wall_time=self._now(), step=step, session_log=SessionLog(status=SessionLog.START))
        self._append("the beginning of the run", [version, start])

    def write(self, step: int, summaries: Sequence[Any]) -> None:
        """Append summaries at x = `step`. Raises LogError."""
        from tensorboard.compat.proto.event_pb2 import Event

        now = self._now()
        self._append(f"update {step}", [Event(wall_time=now, step=step, summary=summary) for summary in summaries])

    def _now(self) -> float:
        return time.time() - self._pause

    def _append(self, what: str, events: Sequence[Any]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        records = io.BytesIO()
        writer = RecordWriter(records)
        for event in events:
            writer.write(event.SerializeToString())
        try:
            # a file that was deleted can still be written to, and nobody would ever read it
            if os.fstat(self._file.fileno()).st_nlink == 0:
                raise FileNotFoundError(0, "the directory has disappeared")
            self._file.write(records.getvalue())
            self._file.flush()
        except OSError as error:
            self.failed = True
            self.close()
            raise LogError(f"cannot write {what} to {self._path.parent}: {error.strerror or error}") from error

    def close(self) -> None:
        """Let the file go; what could not be written before is not tried again."""
        with suppress(OSError):
            self._file.close()


def _described(spec: str, hparams: Mapping[str, bool | int | float | str]) -> list[Any]:
    """Return the records that tell what the run is: its spec as text and its hyperparameters."""
    from torch.utils.tensorboard.summary import text

    # not SummaryWriter.add_hparams: that puts the record into a run of its own, below this one. And no record of an
    # experiment: the page takes its columns from one run's, whatever the others have; without any, it has the
    # hyperparameters of all runs, those that differ first
    _, session, _ = _records({"stack": spec, **hparams})
    described = [text("metaopt/spec", f"    {spec}")] if spec else []  # type: ignore[no-untyped-call]
    return [*described, session]


def _histogram(tag: str, histogram: Histogram) -> Any:
    from torch.utils.tensorboard.summary import histogram_raw

    counted = [i for i, count in enumerate(histogram.counts) if count] or [0]
    # what TensorBoard draws begins and ends where there is something
    first, last = counted[0], counted[-1]
    edges, counts = histogram.edges[first : last + 2], histogram.counts[first : last + 1]
    middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    return histogram_raw(  # type: ignore[no-untyped-call]
        tag,
        min=edges[0],
        max=edges[-1],
        num=sum(counts),
        sum=sum(n * x for n, x in zip(counts, middles, strict=True)),
        sum_squares=sum(n * x * x for n, x in zip(counts, middles, strict=True)),
        bucket_limits=list(edges[1:]),
        bucket_counts=list(counts),
    )


def _records(hparams: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    from torch.utils.tensorboard.summary import hparams as records

    made: tuple[Any, Any, Any] = records(dict(hparams), {})  # type: ignore[no-untyped-call]
    return made


def _writable(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise LogError(f"cannot write to the log directory {directory}: {error.strerror or error}") from error
    return directory


def _wait_for_a_later_name(directory: Path) -> list[str]:
    """Return the names of the event files; event files are read in the order of their names, which count seconds."""
    names = sorted(path.name for path in directory.glob("events.out.tfevents.*"))
    seconds = [field for name in names if (field := name.split(".")[3]).isdigit()]
    now = time.time()
    if seconds and int(max(seconds)) == int(now):
        time.sleep(int(now) + 1 - now)
    return names


@hookimpl
def metaopt_loggers() -> dict[str, type[Logger]]:
    return {"tensorboard": TensorBoard}
