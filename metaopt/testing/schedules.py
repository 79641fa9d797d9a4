"""Checks of schedules: a pure function of the count of updates, in closed form."""

import copy
import inspect
import itertools
import math
import pickle
import random
from dataclasses import dataclass
from typing import Any

from metaopt.errors import MetaoptError
from metaopt.schedule import Curve, Schedule
from metaopt.specs.parsing import parse
from metaopt.specs.text import to_text
from metaopt.testing.outcome import CheckFailed, NotApplicable, check
from metaopt.testing.subject import Subject

RUN = 60  # updates of the run
BEYOND = 20  # looked at after its end


@dataclass(frozen=True)
class ScheduleSubject(Subject):
    """A schedule, made from its text."""

    def made(self) -> Schedule:
        """Return a new schedule object."""
        found = parse(f"sgd(lr={self.text})").parts[0].arguments["lr"]
        if not isinstance(found, Schedule):
            raise CheckFailed(f"{self.text} is not a schedule", "It was registered as one", "Subclass metaopt.Schedule")
        return found

    def curve(self) -> Curve:
        """Return the curve of a new schedule over the run."""
        try:
            return self.made().curve(RUN, RUN)
        except Exception as error:
            raise CheckFailed(
                f"{self.text}: curve({RUN}, {RUN}) raised {type(error).__name__}: {error}",
                f"A run of {RUN} updates cannot be built with it",
                "Give a metaopt.Example(spec=...) that fits; raise HyperparameterError only for lengths that cannot be",
            ) from error


@check("schedule")
def gives_finite_floats(subject: ScheduleSubject) -> None:
    """Every value from the first update to beyond the end is a finite Python float."""
    curve = subject.curve()
    for t in range(RUN + BEYOND):
        try:
            value = curve(t)
        except Exception as error:
            raise CheckFailed(
                f"{subject}: the value at t = {t} raised {type(error).__name__}: {error}",
                "Runs go on after a schedule's end, and resumed ones start anywhere",
                "Give a value for every t from 0 on; after the end the last one",
            ) from error
        if not isinstance(value, float) or not math.isfinite(value):
            raise CheckFailed(
                f"{subject}: the value at t = {t} is {value!r}",
                "It is written into the group as it is, for the optimizer to multiply with",
                "Return a finite float, also at t = 0 and after the end",
            )


@check("schedule", presumes=("gives_finite_floats",))
def is_pure(subject: ScheduleSubject) -> None:
    """The same t gives the same value, however often and in whatever order it is asked, from old and new objects."""
    expected = [subject.curve()(t) for t in range(RUN + BEYOND)]
    forwards = list(range(RUN + BEYOND))
    shuffled = random.Random(0).sample(forwards, len(forwards))
    schedule = subject.made()
    curves = schedule.curve(RUN, RUN), schedule.curve(RUN, RUN)
    for how, order in (("in order", forwards), ("backwards", forwards[::-1]), ("out of order", shuffled)):
        for t, curve in itertools.product(order, curves):
            value = curve(t)
            if value != expected[t]:
                raise CheckFailed(
                    f"{subject}: asked {how}, the value at t = {t} is {value!r}; a new curve gives {expected[t]!r}",
                    "A resumed run asks for one t in the middle, a picture for all, each group for its own: what was "
                    "asked before must not matter",
                    "Compute the value from t alone, in closed form; keep no counter and no last value",
                )


@check("schedule", presumes=("gives_finite_floats",))
def honours_its_length(subject: ScheduleSubject) -> None:
    """After its length a schedule holds its last value; a length that needs the run's and lacks it is refused."""
    schedule = subject.made()
    curve, length = subject.curve(), schedule.length(RUN, RUN)
    if length is not None:
        late = [t for t in range(length, RUN + BEYOND) if curve(t) != curve(length)]
        if late:
            raise CheckFailed(
                f"{subject}: its length is {length} updates, but at t = {late[0]} it is {curve(late[0])!r} and not "
                f"{curve(length)!r}",
                "A run that goes on after the schedule's end would meet a rate that nobody chose",
                "Clamp t to the length: min(t / steps, 1.0)",
            )
    try:
        schedule.curve(None, None)
    except MetaoptError:
        return
    except Exception as error:
        raise CheckFailed(
            f"{subject}: without a length of the run it raised {type(error).__name__}: {error}",
            "Users forget total_steps, and the error has to say so",
            "Ask self.resolve_steps(self.steps, run, span): it raises the right error",
        ) from error
    if length is None and "steps" in schedule.hyperparameters:
        raise CheckFailed(
            f"{subject}: it has `steps` but length() is None", "Plans of a run ask for it", "Do not override length()"
        )


@check("schedule", presumes=("gives_finite_floats", "is_pure"))
def text_rebuilds_the_schedule(subject: ScheduleSubject) -> None:
    """Its text, a copy and a pickle give an equal schedule with the same values."""
    schedule = subject.made()
    text = to_text(schedule, str(subject))
    twins: dict[str, Any] = {
        f"the text {text!r}": ScheduleSubject(subject.entry, subject.example, text, subject.device).made(),
        "copy.deepcopy": copy.deepcopy(schedule),
        "pickle": pickle.loads(pickle.dumps(schedule)),
    }
    for how, twin in twins.items():
        values, others = schedule.curve(RUN, RUN), twin.curve(RUN, RUN)
        if twin != schedule or any(values(t) != others(t) for t in range(RUN)):
            raise CheckFailed(
                f"{subject}: {how} gives another schedule: {twin!r}",
                "A run is known by its text and continued from its checkpoint",
                "Make every setting a hyperparameter with hyper(...); keep nothing else in the object",
            )


@check("schedule", presumes=("gives_finite_floats", "is_pure"))
def drives_a_rate(subject: ScheduleSubject) -> None:
    """In a stack it sets the rate of every update to its value, and a loaded checkpoint goes on in the middle."""
    import torch

    import metaopt

    curve = subject.curve()
    rates: list[list[float]] = []
    saved = None
    for start in (0, RUN // 2):
        x = torch.nn.Parameter(torch.zeros(2))
        opt = metaopt.build([x], f"sgd(lr={subject.text})", total_steps=RUN)
        if saved is not None:
            opt.load_state_dict(saved)
        rates.append([])
        for t in range(start, RUN):
            rates[-1].append(opt.param_groups[0]["lr"])
            x.grad = torch.zeros(2)
            opt.step()
            if t + 1 == RUN // 2:
                saved = copy.deepcopy(opt.state_dict())
        expected = [curve(t) for t in range(start, RUN)]
        if rates[-1] != expected:
            t = next(i for i, (a, b) in enumerate(zip(rates[-1], expected, strict=True)) if a != b)
            raise CheckFailed(
                f"{subject}: update {start + t + 1} was made with the rate {rates[-1][t]!r}, not {expected[t]!r}"
                + (", after loading a checkpoint" if start else ""),
                "The value of an update is computed from the count of updates alone",
                "Keep no counter and no last value",
            )


@check("schedule", presumes=("gives_finite_floats", "is_pure"))
def follows_its_reference(subject: ScheduleSubject) -> None:
    """Every value is that of the author's reference, to 1e-12."""
    reference = subject.example.reference
    if reference is None:
        raise NotApplicable("its author gives no reference; see metaopt.testing.references")
    schedule, curve = subject.made(), subject.curve()
    wanted = list(inspect.signature(reference).parameters)[2:]
    given = {name: getattr(schedule, name) for name in wanted}
    for t in range(RUN + BEYOND):
        value, expected = curve(t), reference(t, RUN, **given)
        if not abs(value - expected) <= 1e-12 * (1.0 + abs(expected)):
            raise CheckFailed(
                f"{subject} is {value!r} at t = {t}, its reference {expected!r}",
                "The rule that is trained is not the rule that is written down",
                "Find out which of the two is wrong",
            )
