"""`python -m metaopt`: the same as the command `metaopt`."""

import sys
from importlib.util import find_spec

from metaopt.errors import MissingExtra


def main() -> None:
    """Run the command line, or say in one line which package it lacks."""
    missing = next((name for name in ("typer", "rich") if find_spec(name) is None), None)
    if missing is not None:
        print(f"metaopt: {MissingExtra('the command line', missing, 'cli')}", file=sys.stderr)
        sys.exit(2)
    from metaopt.cli import main as run

    run()


if __name__ == "__main__":
    main()
