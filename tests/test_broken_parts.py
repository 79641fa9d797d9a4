"""Deliberately broken parts: each is caught by the check meant for it, with a message that says what is wrong."""

import json

import broken_parts
import broken_worker
import pytest
import warm

from metaopt.testing import CHECKS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return warm.called(broken_worker.put_to_the_checks, str(tmp_path_factory.mktemp("suite")))


@pytest.mark.parametrize("name", broken_parts.CAUGHT)
def test_a_broken_part_is_caught_by_name(name, found):
    _, says = broken_parts.CAUGHT[name]
    status, reason = found["broken"][name]
    assert status == "failed", reason
    assert says in reason


@pytest.mark.parametrize("name", ["sound_pull", "sound_descent"])
def test_a_sound_part_among_them_passes(name, found):
    assert found["sound"][name] == []
    assert len(found["passed"][name]) > 20


@pytest.mark.parametrize("kind", ["optimizer", "wrapper", "schedule"])
def test_nearly_every_check_is_shown_to_catch_something(kind):
    shown = {check for check, _ in broken_parts.CAUGHT.values()}
    never = {check.name for check in CHECKS.values() if kind in check.kinds} - shown
    # these hold by the engine's doing, whatever a part does that others do not catch first
    assert never <= {"template_step_leaves_the_run_alone", "skipped_update_advances_nothing", "drives_a_rate"}


def test_the_command_fails_broken_parts_and_says_what_is_wrong(found):
    status, printed = found["table"]
    told = " ".join(printed.split())
    assert status == 1
    assert "state_is_whole_at_the_first_step: failed" in told
    assert "starts where training already is" in told
    assert "tells_when_it_moves_the_weights: failed" in told
    assert "Write group.set_params(tensors)" in told
    assert "is_pure: failed" in told


def test_a_failure_that_another_explains_names_that_one(found):
    assert found["presuming"] == "It presumes resumes_in_a_new_process, which fails: mend that first."


def test_what_many_checks_say_alike_is_printed_once(found):
    _, printed = found["table"]
    told = " ".join(printed.split())
    assert told.count("presumes stacks_do_not_disturb_each_other") == 1
    assert "evaluates_a_closure, skipped_update_advances_nothing," in told


def test_every_check_that_is_presumed_exists_for_the_same_parts():
    for check in CHECKS.values():
        assert all(set(check.kinds) <= set(CHECKS[name].kinds) for name in check.presumes), check.name


def test_the_command_prints_json(found):
    status, printed = found["json"]
    told = json.loads(printed)
    assert status == 1
    assert told["failed"] == 1
    assert [(row["part"], row["status"]) for row in told["results"]] == [("remembers", "failed")]


def test_one_line_of_pytest_runs_the_same_checks(found):
    status, printed = found["suite"]
    assert status == 1
    assert "test_slow_in_self[slow_in_self-object_is_configuration]" in printed
    assert "slow_in_self changes self.kept while it runs" in printed
    assert "FAILED test_parts.py::test_sound" not in printed
