"""What proves parts: expected failures, examples, and a user's mistakes."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import metaopt
from metaopt.cli import main
from metaopt.errors import MetaoptError, PluginError
from metaopt.registry import Entry, Registry
from metaopt.testing import CHECKS, cases, outcome, prove


def test_an_expected_failure_that_is_needed_is_told_and_no_failure():
    (case,) = cases("adafactor")
    result = outcome(case, CHECKS["waits_for_no_device"])
    assert result.status == "excused"
    assert "reads the norm" in result.reason


def test_an_expected_failure_that_is_no_longer_needed_is_a_failure():
    case = cases("adam", expected_failures={"changes_parameters": "it does not move"})[0]
    result = outcome(case, CHECKS["changes_parameters"])
    assert result.bad
    assert "take it out of expected_failures" in result.reason


def test_an_expected_failure_of_no_check_is_an_error():
    with pytest.raises(MetaoptError, match="expects a failure of moves"):
        prove(cases("adam", expected_failures={"moves": "it does not move"})[0])


def test_a_part_that_cannot_be_run_says_why():
    (result,) = prove(cases("adam", skip_reason="needs a device of another world")[0])
    assert result.status == "not run"
    assert result.reason == "needs a device of another world"
    assert not result.bad


def test_a_part_may_be_given_as_text():
    (case,) = cases("lookahead(k=3, alpha=0.8)")
    assert case.subjects[0].text == "sgd(lr=0.1, momentum=0.9) | lookahead(k=3, alpha=0.8)"


def test_a_wrapper_is_checked_over_bases_of_every_kind():
    texts = [subject.text for subject in cases("ema")[0].subjects]
    assert {text.partition("(")[0] for text in texts} == {"sgd", "adamw", "adagrad"}


@pytest.mark.parametrize("name", list(CHECKS))
def test_every_check_has_a_claim(name):
    assert len(CHECKS[name].claim) > 30


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["check"], "Name a part"),
        (["check", "lookahed"], "Did you mean lookahead?"),
        (["check", "adam", "--only", "changes_parameter"], "Did you mean changes_parameters?"),
        (["check", "lookahead(k=0)"], "k must be >= 1, got 0"),
        (["check", "adam", "--device", "nowhere"], "nowhere"),
    ],
)
def test_a_user_s_mistake_is_one_line_and_status_2(capsys, arguments, told):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    printed = capsys.readouterr()
    assert left.value.code == 2
    assert len(printed.err.splitlines()) == 1
    assert told in printed.err


@pytest.mark.slow
def test_the_command_shows_every_claim_of_a_sound_part(capsys):
    with pytest.raises(SystemExit) as left:
        main(["check", "sgd(lr=0.1)"])
    printed = capsys.readouterr()
    assert not left.value.code, printed.out
    for each in CHECKS.values():
        assert ("optimizer" in each.kinds) == (each.claim in printed.out), each.name


def offering(**hooks):
    return type(
        "Plugin", (), {name: staticmethod(metaopt.hookimpl(lambda found=found: found)) for name, found in hooks.items()}
    )


def test_an_example_of_a_part_that_the_plugin_does_not_offer_is_an_error():
    plugin = offering(metaopt_optimizers={"mine": torch.optim.SGD}, metaopt_examples={"mime": metaopt.Example()})
    with pytest.raises(PluginError, match=r"'mime'.*Did you mean mine"):
        Registry()._take_plugin(plugin, "some plugin", "")


def test_an_example_that_is_none_is_an_error():
    plugin = offering(metaopt_optimizers={"mine": torch.optim.SGD}, metaopt_examples={"mine": "mine(lr=1.0)"})
    with pytest.raises(PluginError, match=r"must be a metaopt\.Example"):
        Registry()._take_plugin(plugin, "some plugin", "")


def test_a_hook_that_is_not_marked_is_an_error():
    def metaopt_wrappers():
        return {}

    plugin = type("Plugin", (), {"metaopt_wrappers": staticmethod(metaopt_wrappers)})
    with pytest.raises(PluginError, match="metaopt_wrappers is not marked as a hook: write @hookimpl above it"):
        Registry()._take_plugin(plugin, "some plugin", "")


class NoCurve(metaopt.Schedule):
    """v(t) = ?"""


@pytest.mark.parametrize(
    ("kind", "target", "told"),
    [
        ("wrapper", torch.optim.SGD, "SGD is not a subclass of metaopt.Wrapper"),
        ("schedule", metaopt.Wrapper, "Wrapper is not a subclass of metaopt.Schedule"),
        ("schedule", lambda: 0.1, "is not a subclass of metaopt.Schedule"),
        ("schedule", NoCurve, r"NoCurve leaves out what a schedule must have: define curve\(\)"),
    ],
)
def test_what_is_not_of_its_kind_is_an_error_where_it_is_looked_up(kind, target, told):
    entry = Entry("mine", kind, target, "some plugin")
    with pytest.raises(PluginError, match=f"some plugin offers 'mine'.*{told}"):
        metaopt.specs.pipeline._from_entry(entry)


def test_a_new_process_answers_without_inherited_memory():
    from metaopt.testing.new_process import continue_from_every_step

    subject = cases("adamw")[0].subjects[0]
    found = continue_from_every_step(subject)
    assert sorted(found) == list(range(len(subject.run.checkpoints) - 1))
    # and a second request is answered by the same server
    assert continue_from_every_step(replace(subject)).keys() == found.keys()


@pytest.mark.slow
def test_importing_the_kit_needs_no_pytest():
    program = "import sys, metaopt.testing; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
