"""Proving parts: which checks a part is put to, on which examples, and what came of them."""

import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from dataclasses import replace as changed
from importlib import import_module
from typing import Any

import torch

from metaopt.errors import MetaoptError
from metaopt.hooks import Example
from metaopt.lab.named import problem_entry
from metaopt.registry import Entry, registry
from metaopt.specs.parsing import parse
from metaopt.testing.allowed_values import spec_with_allowed
from metaopt.testing.executors import ExecutorSubject, is_executor
from metaopt.testing.loggers import LoggerSubject
from metaopt.testing.outcome import CHECKS, Check, CheckFailed, NotApplicable, Result
from metaopt.testing.problems import ProblemSubject
from metaopt.testing.schedules import ScheduleSubject
from metaopt.testing.spaces import SpaceSubject
from metaopt.testing.subject import StackSubject, Subject, refused
from metaopt.testing.tuners import TunerSubject

# each adds its checks, which are shown in this order
for _module in (
    *("training", "groups", "states", "resuming", "distributed", "averages"),
    *("laws", "declarations", "agreement", "references", "schedules", "spaces", "tuners", "loggers", "problems"),
    "executors",
):
    import_module(f"metaopt.testing.{_module}")

# with a moment, with lazy state, with state from its constructor
BASES = ("sgd(lr=0.1, momentum=0.9)", "adamw(lr=0.01)", "adagrad(lr=0.1)")


@dataclass(frozen=True)
class Case:
    """One example of one part, with the subjects that are checked: a wrapper over each of several bases."""

    name: str
    example: Example
    subjects: tuple[Subject, ...]

    @property
    def checks(self) -> list[Check]:
        """The checks of this kind of part."""
        return [check for check in CHECKS.values() if self.subjects[0].entry.kind in check.kinds]


def cases(name: str, *, device: str = "cpu", **given: Any) -> list[Case]:
    """Return the cases of the part of this name, or of a part as text, such as `lookahead(k=2)`.

    An executor is named as `--on` names it: `slurm:cluster=local`. `given` replaces fields of each `metaopt.Example`.
    Raises MetaoptError.
    """
    if is_executor(name):
        entry = Entry(name, "executor", registry.executors()[name.partition(":")[0]], "")
        example = Example(**given)
        return [Case(name, example, (ExecutorSubject(entry, example, name, torch.device(device)),))]
    if ":" in name.partition("(")[0]:  # a user's own problem, in a module of theirs
        entry = problem_entry(name)
        return [Case(entry.name, Example(), (ProblemSubject(entry, Example(), "", torch.device(device)),))]
    text = "" if "(" not in name else name
    entry = registry.find(name.partition("(")[0].strip())
    examples = registry.examples(entry.name)
    if text:
        examples = (changed(examples[0], spec=text),)
    found = []
    for example in examples:
        example = changed(example, **given)
        subjects = tuple(_subjects(entry, example, torch.device(device)))
        found.append(Case(entry.name if len(examples) == 1 else str(example.spec or entry.name), example, subjects))
    return found


def _subjects(entry: Entry, example: Example, device: torch.device) -> Iterator[Subject]:
    if example.skip_reason:
        yield Subject(entry, example, example.spec, device)
        return
    if entry.kind in ("problem", "logger"):
        yield (ProblemSubject if entry.kind == "problem" else LoggerSubject)(entry, example, "", device)
        return
    if entry.kind == "schedule":
        yield ScheduleSubject(entry, example, example.spec or spec_with_allowed(entry.name, entry.kind), device)
        return
    if entry.kind == "tuner":
        yield TunerSubject(entry, example, example.spec or spec_with_allowed(entry.name, entry.kind), device)
        return
    if entry.kind == "space":
        yield SpaceSubject(entry, example, example.spec or spec_with_allowed(entry.name, entry.kind), device)
        return
    text = example.spec or spec_with_allowed(entry.name, entry.kind)
    parse(text)  # a mistake in the text is not the part's
    if entry.kind == "optimizer":
        yield StackSubject(entry, example, text, device)
    else:
        before = entry.target.runs_before_base()
        for base in example.bases or BASES:
            stack = f"{text} | {base}" if before else f"{base} | {text}"
            yield StackSubject(entry, example, stack, device)


def outcome(case: Case, check: Check) -> Result:
    """Put a case to a check and say what came of it."""
    if case.example.skip_reason:
        return Result(case.name, check.name, check.claim, "not run", case.example.skip_reason)
    reasons = []
    reason = case.example.expected_failures.get(check.name)
    for subject in case.subjects:
        try:
            with warnings.catch_warnings():
                # what code from elsewhere warns of is not what is checked
                warnings.simplefilter("ignore")
                check.holds(subject)
        except NotApplicable as error:
            reasons.append(str(error))
        except Exception as error:
            if reason is not None:
                return Result(case.name, check.name, check.claim, "excused", reason)
            return Result(case.name, check.name, check.claim, "failed", _cause(subject, check) or _told(error))
    if reason is not None:
        return Result(
            case.name,
            check.name,
            check.claim,
            "outdated",
            f"its metaopt.Example expects it to fail ({reason}), but it passes: take it out of expected_failures",
        )
    if len(reasons) == len(case.subjects):
        return Result(case.name, check.name, check.claim, "not applicable", reasons[0])
    return Result(case.name, check.name, check.claim, "passed")


def _cause(subject: Subject, check: Check) -> str:
    """Return which of the checks that this one presumes fails, or an empty text."""
    for name in check.presumes:
        if name not in subject.faults:
            subject.faults[name] = False
            try:
                CHECKS[name].holds(subject)
            except NotApplicable:
                pass
            except Exception:
                subject.faults[name] = True
        if subject.faults[name]:
            return f"It presumes {name}, which fails: mend that first."
    return ""


def _told(error: Exception) -> str:
    if isinstance(error, CheckFailed) or refused(error):
        return str(error)
    return f"{type(error).__name__}: {error}"


def prove(
    case: Case, each: Callable[[Result], None] = lambda result: None, *, only: Collection[str] | None = None
) -> list[Result]:
    """Put a case to all of its checks, or to some by name; `each` hears of every result as it comes."""
    _unknown_failures(case)
    results = []
    for check in case.checks:
        if only is not None and check.name not in only:
            continue
        results.append(outcome(case, check))
        each(results[-1])
        if results[-1].status == "not run":
            break
    return results


def _unknown_failures(case: Case) -> None:
    unknown = case.example.expected_failures.keys() - {check.name for check in case.checks}
    if unknown:
        raise MetaoptError(
            f"the example of {case.name} expects a failure of {', '.join(sorted(unknown))}, which is not a check of a "
            f"{case.subjects[0].entry.kind}; there are {', '.join(check.name for check in case.checks)}"
        )
