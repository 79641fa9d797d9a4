"""What the author of a plugin needs to prove a part correct: the checks, as a pytest test and as plain functions."""

from metaopt.testing.outcome import CHECKS, Check, CheckFailed, NotApplicable, Result, check
from metaopt.testing.proving import Case, cases, outcome, prove
from metaopt.testing.suite_of_parts import suite

__all__ = [
    "CHECKS",
    "Case",
    "Check",
    "CheckFailed",
    "NotApplicable",
    "Result",
    "cases",
    "check",
    "outcome",
    "prove",
    "suite",
]
