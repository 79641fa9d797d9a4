"""Every example runs, and Rosenbrock ends where it should."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def run(example, folder):
    done = subprocess.run(
        [sys.executable, str(example)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_runs_and_prints(example, tmp_path):
    assert run(example, tmp_path).strip()


def test_rosenbrock_ends_at_the_known_points_and_draws(tmp_path):
    output = run(next(e for e in EXAMPLES if e.stem == "rosenbrock"), tmp_path)
    ends = {name: (float(x), float(y)) for name, x, y in re.findall(r"(\w+) +ends at \((\S+), (\S+)\)", output)}
    assert ends["SGD"] == pytest.approx((0.242146, 0.055676), abs=2e-6)
    assert ends["momentum"] == pytest.approx((0.958858, 0.919240), abs=2e-6)
    assert ends["Adam"] == pytest.approx((0.411228, 0.166267), abs=2e-6)
    # chaotic: the last bits of the square root decide where it goes
    assert ends["RMSprop"] == pytest.approx((0.7795, 0.5940), abs=1e-2)
    assert (tmp_path / "rosenbrock.png").stat().st_size > 10_000


def test_every_optimizer_learns_xor(tmp_path):
    output = run(next(e for e in EXAMPLES if e.stem == "xor"), tmp_path)
    names = [line.split()[0] for line in output.splitlines()]
    assert names == ["SGD", "momentum", "RMSprop", "Adam", "AdamW"]
    losses = [float(value) for value in re.findall(r"\bloss (\S+)", output)]
    assert len(losses) == 5 and max(losses) < 0.5
