"""What `torchrun` needs to hand the options of `metaopt` on, as they are written.

Python's argparse, up to 3.12.7, refuses an option behind the name of the program if it abbreviates several options of
torchrun: `torchrun -m metaopt train --log runs/x` ends in "ambiguous option: --log could match --log-dir, ...". Behind
`--` it takes everything as it is. torchrun imports the entry points of the group `torchrun.handlers` before it reads
its arguments, and that is the only code of others that it runs by then.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

# options of torchrun that take no value
_FLAGS = {"-m", "--module", "--no-python", "--no_python", "--run-path", "--run_path", "--standalone"}
_FLAGS |= {"--virtual-local-rank", "--virtual_local_rank"}
# `torchrun`, and `python -m torch.distributed.run`
_PROGRAMS = ("torchrun", "torchrun.exe", "run.py")


def rendezvous_handler() -> Callable[[Any], Any]:
    """Put `--` in front of `metaopt` if this process is a torchrun that starts it; other programs stay as they are."""
    sys.argv[:] = separated(sys.argv)
    return _refused


def separated(arguments: list[str]) -> list[str]:
    """Return the command line of a torchrun with `--` in front of `metaopt`, and any other command line unchanged."""
    if not arguments or Path(arguments[0]).name not in _PROGRAMS:
        return arguments
    position = 1
    while position < len(arguments) and arguments[position].startswith("-"):
        option = arguments[position]
        if option == "--":
            return arguments
        position += 1 if option in _FLAGS or "=" in option else 2
    if arguments[position : position + 1] != ["metaopt"]:
        return arguments
    return [*arguments[:position], "--", *arguments[position:]]


def _refused(parameters: Any) -> NoReturn:
    # the group is one of rendezvous backends, so torchrun lists this name among them
    raise ValueError("metaopt has no rendezvous backend: give --rdzv-backend c10d")
