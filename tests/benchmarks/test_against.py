"""`python -m benchmarks.against`: two checkouts side by side, and one that is slower is found out."""

import shutil

import pytest
from documents import ROOT

from benchmarks.against import Comparison, main


def copy_package(folder):
    """Return a checkout that holds a copy of this package."""
    shutil.copytree(ROOT / "metaopt", folder / "metaopt", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.slow
def test_a_checkout_that_is_slower_is_found_out(tmp_path, capsys):
    slower = copy_package(tmp_path)
    stack = slower / "metaopt" / "__init__.py"
    stack.write_text(stack.read_text() + SLOW)
    arguments = ["--spec", "sgd(lr=0.1)", "--shapes", "tiny", "--rounds", "2", "--starts", "1", "--limit", "2"]
    assert main([str(ROOT), "--new", str(slower), *arguments]) == 1
    printed = capsys.readouterr().out
    assert "| tiny | sgd(lr=0.1) | " in printed and printed.rstrip().endswith("SLOWER |")
    # the other way round it is faster
    assert not Comparison("sgd(lr=0.1)", "tiny", old=[5e-3, 6e-3], new=[1e-4, 2e-4]).is_slower(2)


SLOW = """
import time as _time
from metaopt.stack import Stack as _Stack
_step = _Stack.step
_Stack.step = lambda self, closure=None: (_time.sleep(0.005), _step(self, closure))[1]
"""


@pytest.mark.slow
def test_a_folder_without_the_package_and_a_spec_that_is_refused_are_reported(tmp_path, capsys):
    assert main([str(tmp_path), "--shapes", "tiny"]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    arguments = ["--spec", "adamw | no_such_part", "--shapes", "tiny", "--rounds", "1", "--starts", "1"]
    assert main([str(ROOT), *arguments]) == 2
    assert "no_such_part" in capsys.readouterr().out
