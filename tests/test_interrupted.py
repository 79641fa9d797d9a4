"""Comparisons that are killed, that run out of disk, or that share a folder end in the same results."""

import random
import re
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
from warm import Command, run

from metaopt.lab.holding import SCRATCH

pytestmark = pytest.mark.slow

OUT = "results"
COMMAND = ["compare", "--problem", "noisy_quadratic", "-o", "sgd", "-o", "sgd(momentum=0.9)", "-o", "adamw"]
COMMAND += ["--studies", "6", "--trials", "3", "--steps", "12", "--jobs", "1", "--out", OUT]


def results(folder: Path) -> bytes:
    """Return results.json without its times and the numbers of the processes that made each trial."""
    found = (folder / OUT / "results.json").read_bytes()
    assert b'"process"' in found
    return re.sub(rb'"(seconds|process)": [-+.e\d]+', rb'"\1": 0', found)


def finished(folder: Path) -> int:
    return len(list((folder / OUT / "trials").glob("*.json")))


def left_behind(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(SCRATCH.format("*")) if path.is_file()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    status, _, errors = run(COMMAND, folder)
    assert status == 0, errors
    return folder


def killed(folder: Path, times: int, trials: int) -> int:
    """Kill the command at random moments, as long as it makes trials; return how often it was killed."""
    moments = random.Random(0)
    kills = 0
    for number in range(times):
        command, before = Command(COMMAND, folder), finished(folder)
        # by the last time most trials are made: some moments are among the runs, some before the first and some after
        more = moments.randint(0, 2 * trials // times)
        until = time.monotonic() + 120
        while command.running() and finished(folder) < before + more and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(moments.random() * 0.05)
        kills += command.running()
        command.kill()
        assert number or kills, "the command was over before it was killed"
    return kills


def test_a_comparison_killed_at_ten_random_moments_ends_in_the_same_bytes(tmp_path: Path, undisturbed: Path) -> None:
    assert killed(tmp_path, 10, finished(undisturbed)) >= 8
    assert run(COMMAND, tmp_path)[0] == 0
    assert results(tmp_path) == results(undisturbed) and not left_behind(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="the size of files is bounded by POSIX alone")
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(tmp_path: Path, undisturbed: Path) -> None:
    sizes = [path.stat().st_size for path in (undisturbed / OUT / "trials").glob("*.json")]
    document = (undisturbed / OUT / "results.json").stat().st_size
    # some trials fit; all do and the curves do not; the results do and the pictures in the event file do not
    for largest in (sorted(sizes)[len(sizes) // 2], max(sizes) + 1000, document + 1):
        status, _, errors = run(COMMAND, tmp_path, largest_file=largest)
        told = [line for line in errors.splitlines() if line.startswith("metaopt: ")]
        assert (status, len(told)) == (2, 1), errors
        assert "cannot" in told[0] and "File too large" in told[0]
        assert not left_behind(tmp_path), largest
    assert run(COMMAND, tmp_path)[0] == 0
    assert results(tmp_path) == results(undisturbed)


def test_of_two_processes_in_one_folder_one_is_told_to_wait(tmp_path: Path, undisturbed: Path) -> None:
    both = [Command(COMMAND, tmp_path) for _ in range(2)]
    ended = sorted((command.end() for command in both), key=lambda end: end[0])
    assert ended[0][0] == 0, ended[0][2]
    if ended[1][0]:  # else one was over before the other began
        assert ended[1][0] == 2 and "another process is writing" in ended[1][2]
    assert results(tmp_path) == results(undisturbed)
