"""Checks of loggers: they take every point, go on after a checkpoint, and change nothing of the run."""

import math
import tempfile
from pathlib import Path

import torch

import metaopt
from metaopt.logger import Logger
from metaopt.specs.pipeline import part
from metaopt.testing.comparing import same
from metaopt.testing.outcome import CheckFailed, check
from metaopt.testing.subject import Subject

TAGS = ("train/loss", "train/learning_rate/group no_decay", "a part/größe")


class LoggerSubject(Subject):
    """A logger that writes to a place; one without hyperparameters writes nowhere."""

    def made(self, place: Path) -> Logger:
        """Return a new logger for this place."""
        takes_place = bool(part(self.entry.name, "logger").hyperparameters)
        made: Logger = self.entry.target(place) if takes_place else self.entry.target()
        return made


def _write(logger: Logger, first: int, last: int) -> None:
    for step in range(first, last):
        logger.scalars(step, {tag: math.sin(step) for tag in TAGS})


@check("logger")
def takes_every_point(subject: LoggerSubject) -> None:
    """Points of any tag are written, those that are not finite too, and closing twice does no harm."""
    with tempfile.TemporaryDirectory() as folder:
        logger = subject.made(Path(folder, "run"))
        try:
            logger.open(step=0, tags=TAGS, spec="sgd(lr=0.1)", hparams={"lr": 0.1, "nesterov": True, "name": "x"})
            _write(logger, 1, 4)
            logger.scalars(4, {"train/loss": math.nan, "train/grad_norm": math.inf, "a new tag": -math.inf})
            logger.close()
            logger.close()
        except Exception as error:
            raise CheckFailed(
                f"{subject}: writing points raised {type(error).__name__}: {error}",
                "A run that diverges must still be logged, and ends by closing its log more than once",
                "Take every float and every tag in scalars(), and let close() be called again",
            ) from error


@check("logger")
def goes_on_after_a_checkpoint(subject: LoggerSubject) -> None:
    """A log that was left open is opened again at an earlier step, by a new object and by the same one."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "run")
        try:
            left = subject.made(place)
            left.open(step=0, tags=TAGS, spec="sgd", hparams={})
            _write(left, 1, 6)
            left.close()
            logger = subject.made(place)
            for step in (3, 2):
                logger.open(step=step, tags=TAGS, spec="sgd", hparams={})
                _write(logger, step + 1, 6)
            logger.close()
        except Exception as error:
            raise CheckFailed(
                f"{subject}: opening a log again at an earlier step raised {type(error).__name__}: {error}",
                "A run that was killed goes on from its checkpoint, which is older than the log",
                "In open(step=...) drop the points of later steps and write on",
            ) from error


@check("logger")
def changes_nothing_of_the_run(subject: LoggerSubject) -> None:
    """A run that is logged ends bit for bit where the same run without a log ends."""
    ends = []
    for logged in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            x = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 5))
            log = subject.made(Path(folder, "run")) if logged else None
            opt = metaopt.build([x], "clip_grad_norm(0.5) | adamw(lr=0.1) | lookahead(k=2)", log=log, log_every=1)
            for _ in range(6):
                opt.zero_grad()
                x.square().sum().backward()  # type: ignore[no-untyped-call]
                opt.step()
            opt.log.close()
            ends.append(x.detach().clone())
    if not same(*ends):
        raise CheckFailed(
            f"{subject}: the logged run ends at {ends[1].tolist()}, the other one at {ends[0].tolist()}",
            "Looking must not change what is looked at",
            "Only write in a logger",
        )


@check("logger")
def names_the_place_it_cannot_write(subject: LoggerSubject) -> None:
    """A place that cannot be written is a LogError or an OSError that names it, at construction or at the opening."""
    if not part(subject.entry.name, "logger").hyperparameters:
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "a_file")
        file.write_text("not a directory")
        place = file / "run"
        try:
            logger = subject.made(place)
            logger.open(step=0, tags=TAGS, spec="sgd", hparams={})
            _write(logger, 1, 2)
            logger.close()
        except OSError as error:
            if "a_file" in str(error):
                return
            raise CheckFailed(
                f"{subject}: a place that cannot be written is refused with {str(error)!r}, which does not name it",
                "The user has to find the mistake",
                "Raise metaopt.LogError with the path and the reason",
            ) from error
        except Exception as error:
            raise CheckFailed(
                f"{subject}: a place that cannot be written ends in {type(error).__name__}: {error}",
                "A user's mistake is one clear LogError",
                "Raise metaopt.LogError with the path and the reason",
            ) from error
    raise CheckFailed(
        f"{subject}: nothing was raised for a place that cannot be written",
        "The run would go on, and its log would be missed at the end",
        "Open the file at construction or in open(), and raise metaopt.LogError",
    )
