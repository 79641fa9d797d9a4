"""The problem that a user names: `digits`, or with hyperparameters, `digits(batch_size=32)`."""

import ast
from typing import Any

from metaopt.errors import MetaoptError, ProblemError
from metaopt.problem import Problem
from metaopt.registry import Entry, registry
from metaopt.specs.syntax import Source


def problem_entry(text: str) -> Entry:
    """Return the registered problem that a text names, with or without hyperparameters. Raises UnknownPart."""
    return registry.find(text.partition("(")[0].strip(), "problem")


def problem_named(text: str) -> Problem:
    """Return the problem that a text names, made with the hyperparameters given there; nothing in it is executed.

    Raises MetaoptError, for whatever the class of a plugin raised as well.
    """
    entry = problem_entry(text)
    given = _hyperparameters(text, Source(text)) if "(" in text else {}
    try:
        problem = entry.target(**given)
    except MetaoptError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ProblemError(f"the problem {entry.name} cannot be made: {type(error).__name__}: {reason}") from error
    if not isinstance(problem, Problem):
        raise ProblemError(f"the problem {entry.name} is a {type(problem).__name__}, no metaopt.Problem")
    return problem


def _hyperparameters(text: str, source: Source) -> dict[str, Any]:
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
