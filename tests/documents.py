"""Reading and running what a Markdown page says, and programs in a Python of their own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def blocks(page, language):
    """Return the code blocks of one language, in order."""
    return re.findall(
        rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def python(*arguments, folder, path=()):
    """Run this Python in a folder, with more places to import from; return what it printed. It must succeed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, path)), "COLUMNS": "200"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def in_forks(programs, folder):
    """Run each in a fork of one Python that has imported torch only; return the status, output and errors of each."""
    files = [str(Path(folder, f"printed-{number}")) for number in range(len(programs))]
    asked = json.dumps(list(zip(programs, files, strict=True)))
    done = subprocess.run(
        [sys.executable, "-c", FORKS], cwd=folder, input=asked, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    printed = [[Path(file + end).read_text(encoding="utf-8") for end in (".out", ".err")] for file in files]
    return [(status, *texts) for status, texts in zip(json.loads(done.stdout), printed, strict=True)]


FORKS = """
import json, os, sys, traceback
import torch

statuses = []
for program, file in json.load(sys.stdin):
    new = os.fork()
    if new == 0:
        for number, end in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(file + end, os.O_WRONLY | os.O_CREAT), number)
        status = 1
        try:
            exec(program, {"__name__": "__main__"})
            status = 0
        except SystemExit as left:
            status = left.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(new, 0)[1]))
print(json.dumps(statuses))
"""
