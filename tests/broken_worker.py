"""Run in a process of its own, where broken parts may be registered: put them to the checks, by all three ways."""

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import broken_parts
import pytest
import torch

from metaopt.cli import main
from metaopt.registry import registry
from metaopt.testing import CHECKS, cases, outcome, prove

SUITE = """
from metaopt.testing import suite

test_sound = suite("sound_descent", plugin="broken_parts")
test_slow_in_self = suite("slow_in_self", plugin="broken_parts")
"""


def command(*arguments: str) -> tuple[int, str]:
    """Return the exit status of `metaopt check` and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as left:
        main(["check", *arguments])
    return int(left.value.code or 0), printed.getvalue()


def tests(folder: str) -> tuple[int, str]:
    """Return the exit status of pytest over a file of two suites and what it printed."""
    file = Path(folder, "test_parts.py")
    file.write_text(SUITE, encoding="utf-8")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", folder, "-c", "/dev/null", str(file)])
    return int(status), printed.getvalue()


def put_to_the_checks(folder: str) -> dict[str, Any]:
    """Return what each of the ways said of the broken parts, and of sound ones."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    registry.load_plugin_module("broken_parts")
    sound = {name: prove(cases(name)[0]) for name in ("sound_pull", "sound_descent")}
    found = {name: outcome(cases(name)[0], CHECKS[check]) for name, (check, _) in broken_parts.CAUGHT.items()}
    return {
        "sound": {name: [r.reason for r in results if r.bad] for name, results in sound.items()},
        "passed": {name: [r.check for r in results if r.status == "passed"] for name, results in sound.items()},
        "broken": {name: [result.status, result.reason] for name, result in found.items()},
        "presuming": outcome(cases("counts_outside")[0], CHECKS["takes_every_dtype"]).reason,
        "table": command("late_slow", "silent_mover", "remembers", "shared_count"),
        "json": command("remembers", "sound_descent", "--only", "is_pure", "--json"),
        "suite": tests(folder),
    }
