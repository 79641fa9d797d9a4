"""How long a program waits before it can begin: new processes, each timed from within or as a whole."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence

# the import itself looks nothing up; this is what the first line of a program costs
FIRST_USE = "import metaopt; metaopt.build"

_AFTER = """
import {before}, time
began = time.perf_counter()
{code}
print(time.perf_counter() - began)
"""
_HELP = """
import sys
from metaopt.cli import main
try:
    main({arguments!r})
except SystemExit as exit:
    sys.exit(exit.code or ("torch" in sys.modules) * 3)
"""


def seconds_after(before: str, code: str, rounds: int) -> list[float]:
    """Return what `code` takes, each time in a new process that has imported the module `before`.

    Timed from within: what importing torch takes varies by more than all of metaopt.
    """
    program = ["-c", _AFTER.format(before=before, code=code)]
    return [float(_run(program).stdout) for _ in range(1 + rounds)][1:]


def process_seconds(arguments: Sequence[str], rounds: int) -> list[float]:
    """Return the seconds of each whole python process; one before them only warms the caches of files."""
    found = []
    for _ in range(1 + rounds):
        began = time.perf_counter()
        _run(arguments)
        found.append(time.perf_counter() - began)
    return found[1:]


def help_imports_torch(arguments: Sequence[str]) -> bool:
    """Tell whether the command line imports torch before it has answered these arguments."""
    ran = subprocess.run([sys.executable, "-c", _HELP.format(arguments=list(arguments))], capture_output=True)
    return ran.returncode != 0


def _run(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    # a user's second process finds what the first one compiled
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True, env=kept)
