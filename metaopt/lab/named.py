"""The problem that a user names: `digits`, `digits(batch_size=32)`, or `my_module:name` for one of the user's own."""

import ast
import os
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from metaopt.errors import MetaoptError, ProblemError, did_you_mean
from metaopt.problem_class import Problem
from metaopt.registry import Entry, registry
from metaopt.specs.syntax import Source


def problem_entry(text: str) -> Entry:
    """Return the problem that a text names, with or without hyperparameters. Raises UnknownPart, ProblemError."""
    head = text.partition("(")[0].strip()
    return _own(head) if ":" in head else registry.find(head, "problem")


def text_of(problem: str | Problem, jobs: int = 1) -> str:
    """Return the text that names a problem, here and in `jobs` other processes. Raises ProblemError."""
    if isinstance(problem, str):
        return problem
    if not isinstance(problem, Problem):
        raise ProblemError(f"problem must be a name or a metaopt.Problem, got {problem!r:.60}")
    registered = registry.name_of(type(problem))
    if registered is not None:
        given = ", ".join(f"{name}={value!r}" for name, value in problem.given.items())
        return f"{registered}({given})" if given else registered
    where = getattr(problem, "made_in", None) or type(problem).__module__
    for module in (sys.modules.get(where), sys.modules["__main__"]):
        name = next((name for name, value in vars(module).items() if value is problem), None) if module else None
        if module is not None and name is not None:
            called = _public(module)
            if called == "__main__" and jobs > 1:
                raise ProblemError(f"other processes cannot import {name} from an interactive session: give jobs=1")
            return f"{called}:{name}"
    raise ProblemError(
        f"problem must be a variable at the top level of a module, so that other processes find it: write "
        f"mine = metaopt.problem(...) there and give mine, or the text module:mine, got {type(problem).__name__}"
    )


def suite_named(name: str) -> tuple[str, ...]:
    """Return the problems of a suite, as text. Raises ProblemError."""
    suites = registry.suites()
    if name not in suites:
        raise ProblemError(
            f"a suite must be one of {', '.join(sorted(suites))}, got {name!r}.{did_you_mean(name, suites)}"
        )
    return suites[name]


def file_of(text: str) -> Path | None:
    """Return the file of the module in which a user wrote a problem, or None for one that is registered."""
    head = text.partition("(")[0].strip()
    file = getattr(_module(head.partition(":")[0]), "__file__", None) if ":" in head else None
    return None if file is None else Path(file)


def _public(module: ModuleType) -> str:
    """Return the name under which other processes import a module, also one that is run as a program."""
    if module.__name__ != "__main__":
        return module.__name__
    spec, file = getattr(module, "__spec__", None), getattr(module, "__file__", None)
    if spec is not None:
        return str(spec.name)
    return "__main__" if file is None else Path(file).stem


def _module(name: str) -> ModuleType:
    """Import a module, also from the current folder; the program that runs is not imported a second time."""
    main = sys.modules["__main__"]
    if name not in sys.modules and _public(main) == name:
        return main
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return import_module(name)
    except (Exception, SystemExit) as error:
        raise ProblemError(f"the module {name!r} cannot be imported: {type(error).__name__}: {error}") from error


def _own(head: str) -> Entry:
    """Return what `my_module:name` names as an entry: a problem, a class of problems, or a function that makes one."""
    where, _, name = head.partition(":")
    module = _module(where)
    found = getattr(module, name, None)
    if found is None:
        near = did_you_mean(name, [own for own in vars(module) if not own.startswith("_")])
        raise ProblemError(f"the module {where!r} has no {name!r}.{near}")
    if not isinstance(found, Problem) and not callable(found):
        raise ProblemError(f"{head} must be a metaopt.Problem, its class, or metaopt.problem(...), got {found!r:.60}")
    return Entry(head, "problem", _Made(found, head) if isinstance(found, Problem) else found, where)


class _Made:
    """A problem that was made already, called as its class would be."""

    def __init__(self, problem: Problem, head: str) -> None:
        self._problem, self._head = problem, head

    def __call__(self, **given: Any) -> Problem:
        if given:
            raise ProblemError(f"{self._head} is made already: it takes no hyperparameters, got {', '.join(given)}")
        return self._problem


def problem_named(text: str) -> Problem:
    """Return the problem that a text names, made with the hyperparameters given there; nothing in it is executed.

    Raises MetaoptError, for whatever the class of a plugin raised as well.
    """
    entry = problem_entry(text)
    call = text.partition(":")[2] if ":" in text.partition("(")[0] else text
    given = _hyperparameters(Source(call)) if "(" in call else {}
    try:
        problem = entry.target(**given)
    except MetaoptError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ProblemError(f"the problem {entry.name} cannot be made: {type(error).__name__}: {reason}") from error
    if not isinstance(problem, Problem):
        raise ProblemError(f"the problem {entry.name} must be a metaopt.Problem, got {type(problem).__name__}")
    return problem


def _hyperparameters(source: Source) -> dict[str, Any]:
    call = source.tree()
    form = "a problem is its name, or name(hyperparameter=value, ...)"
    if not isinstance(call, ast.Call) or call.args:
        raise source.refused(call, form)
    given: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg in given:
            raise source.refused(keyword, form)
        try:
            given[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError:
            raise source.refused(keyword.value, form) from None
    return given
