"""Does what a page tells its reader to do, in the current folder.

Blocks of ``python`` run in order, in one namespace; one whose first line is `# NAME.py` is written to that file, and so
are blocks of other languages. Blocks of ``sh`` run line by line. Blocks of ``py`` are pieces to read.
"""

import contextlib
import os
import re
import runpy
import shlex
import sys
from pathlib import Path

# what a test cannot do, and where it is done
LEFT_OUT = {
    "python -m venv": ".ci/run sets up an environment with the command of the README",
    ".venv/bin/pip": "the same",
    "pip install": "needs the network; tests/test_plugin_guide.py installs the plugin of the guide",
    "tensorboard --logdir": "runs until it is interrupted; tests/test_tensorboard.py reads the files",
    "mkdocs": ".ci/run builds the site",
    "git clone": "needs the network",
    "pre-commit": "needs the network",
    ".ci/run": "it runs this test",
}
FENCE = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"\A# ([\w.-]+/)*[\w-]+\.\w+\n")


def blocks(text):
    """Return (language, code) for each block of a page."""
    found = []
    for indent, language, code in FENCE.findall(text):
        found.append((language, "".join(line.removeprefix(indent) for line in code.splitlines(keepends=True))))
    return found


def lines(code):
    """Return the commands of a block of `sh`; a line that ends in a backslash goes on in the next."""
    joined = code.replace("\\\n", " ").splitlines()
    return [line for line in joined if line.strip() and not line.startswith("#")]


def is_left_out(line):
    return any(line.startswith(begin) for begin in LEFT_OUT)


def run(line):
    command, *arguments = shlex.split(line)
    if command == "metaopt":
        from metaopt.cli import main

        main(arguments)
    elif command == "pytest":
        import pytest

        status = pytest.main([*arguments, "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", "."])
        sys.exit(int(status))
    elif command == "python" and arguments[0].endswith(".py"):
        run_program(*arguments)
    else:
        sys.exit(f"nothing here runs this command: {line}")


def run_program(file, *arguments):
    """Do what `python FILE ARGUMENTS` does."""
    sys.argv = [file, *arguments]
    runpy.run_path(file, run_name="__main__")


def run_lines(code):
    """Run the commands of a block of `sh`, each of which must succeed, but for what a test cannot do."""
    for line in lines(code):
        if is_left_out(line):
            continue
        print(f"$ {line}", flush=True)
        with _must_succeed(line):
            run(line)


def follow(page):
    sys.path.insert(0, os.getcwd())
    namespace = {"__name__": "__page__"}
    for language, code in blocks(Path(page).read_text(encoding="utf-8")):
        if name := NAMED.match(code):
            file = Path(name[0][2:].strip())
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(code, encoding="utf-8")
        elif language == "python":
            exec(compile(code, f"{page}, the block that begins {code.splitlines()[0]!r}", "exec"), namespace)
        elif language == "sh":
            run_lines(code)


@contextlib.contextmanager
def _must_succeed(line):
    try:
        yield
    except SystemExit as left:
        # as `diff` does, `metaopt diff` says with its status that the two differ
        if left.code not in ((None, 0, 1) if line.startswith("metaopt diff ") else (None, 0)):
            print(f"{line}: exit {left.code}", file=sys.stderr)
            raise
