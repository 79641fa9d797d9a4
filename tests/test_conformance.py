"""Every registered part, built-in and bridged, holds what `metaopt.testing` claims of its kind."""

import pytest

from metaopt.registry import registry
from metaopt.testing import Case, cases, prove

pytestmark = pytest.mark.slow

CASES = [case for entry in registry.entries() if entry.origin != "this program" for case in cases(entry.name)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_registered_part_passes_its_checks(case: Case) -> None:
    bad = [f"{result.check}: {result.reason}" for result in prove(case) if result.bad]
    assert not bad, "\n".join(bad)


def test_every_part_is_checked_but_a_few_and_those_say_why() -> None:
    left_out = {case.name: case.example.skip_reason for case in CASES if case.example.skip_reason}
    assert len(left_out) <= 8
    assert all(name.startswith("pytorch_optimizer.") and len(reason) > 20 for name, reason in left_out.items())


def test_the_reason_of_every_expected_failure_is_a_sentence() -> None:
    assert all(len(reason) > 20 for case in CASES for reason in case.example.expected_failures.values())
