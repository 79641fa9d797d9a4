"""How long a program waits before it can begin: whole processes, timed in turn."""

import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

IMPORT_TORCH = "import torch"
IMPORT_METAOPT = "import metaopt"
# the import itself looks nothing up; this is what the first line of a program costs
FIRST_USE = "import metaopt; metaopt.build"

_HELP = """
import sys
from metaopt.cli import main
try:
    main({arguments!r})
except SystemExit as exit:
    sys.exit(exit.code or ("torch" in sys.modules) * 3)
"""


def process_seconds(programs: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each python process, round by round; the first round only warms the file cache."""
    found: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(1 + rounds):
        for name, arguments in programs.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            found[name].append(time.perf_counter() - began)
    return {name: seconds[1:] for name, seconds in found.items()}


def median_difference(found: Mapping[str, Sequence[float]], a: str, b: str) -> float:
    """Return the median of a minus b, taken in each round."""
    return statistics.median(x - y for x, y in zip(found[a], found[b], strict=True))


def help_imports_torch(arguments: Sequence[str]) -> bool:
    """Tell whether the command line imports torch before it has answered these arguments."""
    ran = subprocess.run([sys.executable, "-c", _HELP.format(arguments=list(arguments))], capture_output=True)
    return ran.returncode != 0
