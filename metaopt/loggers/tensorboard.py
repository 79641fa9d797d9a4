"""TensorBoard: `tensorboard --logdir runs` shows what is written here."""

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaopt import LogError, Logger, hookimpl

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# what the HParams page compares runs by
METRIC = "train/loss"

# every point is flushed as it is written; the writer's own timer has nothing to add
_FLUSH_SECONDS = 24 * 3600


class TensorBoard(Logger):
    """Writes TensorBoard event files: scalars, the spec as text and one HParams record, all in the run's directory.

    `log` is a directory, which is made, or a SummaryWriter, which stays its owner's: its `purge_step` and its
    `close()` too. Raises LogError where the directory cannot be written.
    """

    def __init__(self, log: "str | os.PathLike[str] | SummaryWriter", metric: str = METRIC) -> None:
        self.metric = metric
        self._writer: Any = None
        self._described = False
        self._owned = isinstance(log, str | os.PathLike)
        if isinstance(log, str | os.PathLike):
            self.directory = _writable(Path(log))
        else:
            self._writer = log
            self.directory = Path(log.log_dir)

    def open(
        self, *, step: int, tags: Sequence[str], spec: str, hparams: Mapping[str, bool | int | float | str]
    ) -> None:
        """Begin the run, or go on after `step` updates; TensorBoard then shows no older point of a later step."""
        earlier = self._open_own(step) if self._owned else False
        if not self._described and not (earlier and step > 0):
            # once per run: what went on in the same directory has its record there already
            self._describe(spec, hparams)
        self._described = True

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write one point per tag at x = `step`, to the disk."""
        # the writer's thread would die of this with a traceback of its own, and a later write would only hint at it
        if not self.directory.is_dir():
            raise LogError(f"the log directory {self.directory} has disappeared: update {step} cannot be written there")
        try:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)
            self._writer.flush()
        except OSError as error:
            raise LogError(f"cannot write update {step} to {self.directory}: {error}") from error

    def close(self) -> None:
        """Close the event file; a SummaryWriter that was given is only flushed."""
        if self._writer is None or not self.directory.is_dir():
            return
        if not self._owned:
            self._writer.flush()
            return
        from torch.utils.tensorboard.summary import hparams as records

        # only a run that was closed is shown as finished
        self._writer.file_writer.add_summary(records({}, {})[2], 0)  # type: ignore[no-untyped-call]
        self._writer.close()
        self._writer = None

    def _open_own(self, step: int) -> bool:
        """Open a new event file that hides what earlier ones hold after `step`; return whether there are any."""
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is not None:
            self._writer.close()
        try:
            earlier = bool(_wait_for_a_later_name(_writable(self.directory)))
            # also where nothing is earlier: TensorBoard takes the first such mark for the start and obeys the second
            self._writer = SummaryWriter(str(self.directory), purge_step=step + 1, flush_secs=_FLUSH_SECONDS)
        except OSError as error:
            raise LogError(f"cannot write to the log directory {self.directory}: {error}") from error
        return earlier

    def _describe(self, spec: str, hparams: Mapping[str, bool | int | float | str]) -> None:
        from torch.utils.tensorboard.summary import hparams as records

        if spec:
            self._writer.add_text("metaopt/spec", f"    {spec}", 0)
        # not SummaryWriter.add_hparams: that puts the record into a run of its own, below this one
        # with "stack" in every record: the page takes its columns from one run's record, whatever the others have
        experiment, session, _ = records({"stack": spec, **hparams}, {self.metric: 0.0})  # type: ignore[no-untyped-call]
        self._writer.file_writer.add_summary(experiment, 0)
        self._writer.file_writer.add_summary(session, 0)
        self._writer.flush()


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
