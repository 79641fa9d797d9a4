"""Optuna chooses the settings, also with several workers, one of which is killed, and through a real server."""

import glob
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

optuna = pytest.importorskip("optuna")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")]

import metaopt_optuna  # noqa: E402

from metaopt.lab import tune  # noqa: E402
from metaopt.registry import registry  # noqa: E402
from metaopt.testing.tuners import Valley  # noqa: E402
from metaopt.tuner import Tried  # noqa: E402

registry.load_plugin_module("metaopt_optuna")
optuna.logging.set_verbosity(optuna.logging.WARNING)


class Killing(Valley):
    """The first worker that makes the fourth trial is killed in the middle of it."""

    def loss(self, tried: Tried) -> float:
        marker = self.folder.parent / "killed"
        with open(self.folder.parent / "losses", "a") as file:
            file.write("x")
        if (self.folder.parent / "losses").stat().st_size >= 4 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.4)  # the others are at work when its heartbeat is missed
        return super().loss(tried)


def killed_search(folder: Path, **given: Any) -> tuple[list[Tried], Any]:
    task = Killing(folder / "trials", 14, 0)
    task.jobs = 2
    tuner = metaopt_optuna.TPE(heartbeat=1, **given)
    return tuner.run(task), tuner.study(task)


def assert_the_killed_trial_was_made_again(tried: list[Tried], study: Any, folder: Path) -> None:
    assert (folder / "killed").exists() and len(tried) == 14
    trials = study.get_trials()
    failed = [trial for trial in trials if trial.state.name == "FAIL"]
    assert len(failed) == 1
    again = [trial for trial in trials if trial.system_attrs.get("failed_trial") == failed[0].number]
    assert len(again) == 1 and again[0].params == failed[0].params and again[0].state.name in ("COMPLETE", "RUNNING")


@pytest.mark.parametrize("method", ["optuna.tpe(startup=4)", "optuna.gp(startup=4, prune=True)"])
def test_a_search_finds_a_setting_and_goes_on_where_it_stopped(tmp_path: Path, method: str) -> None:
    given: dict[str, Any] = {"problem": "xor", "steps": 18, "method": method}
    spec = "sgd(lr=log(1e-2, 1), momentum=choice(0.0, 0.9))"
    tune(spec, **given, trials=5, out=tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "trials")
    found = tune(spec, **given, trials=8, out=tmp_path / "two")
    assert found == tune(spec, **given, trials=8, out=tmp_path / "one")
    assert len(found.trials) == 8 and found.best.loss == min(trial.loss for trial in found.trials if trial.whole)
    if "prune" in method:
        assert any(trial.evaluations < 18 for trial in found.trials)


def test_the_trial_of_a_killed_worker_is_made_again(tmp_path: Path) -> None:
    assert_the_killed_trial_was_made_again(*killed_search(tmp_path), tmp_path)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Yield the URL of a PostgreSQL server of its own on the loopback address."""
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed: pip install metaopt-optuna[postgresql]")
    folders = sorted(glob.glob("/usr/lib/postgresql/*/bin"))
    control = shutil.which("pg_ctl") or (f"{folders[-1]}/pg_ctl" if folders else None)
    if control is None:
        pytest.skip("no PostgreSQL server is installed on this machine")
    home = Path(tempfile.mkdtemp(prefix="postgresql-"))
    as_user: list[str] = []
    if os.getuid() == 0:  # the server refuses to run as root
        user = next((u.pw_name for u in pwd.getpwall() if u.pw_name in ("postgres", "nobody")), None)
        if user is None:
            pytest.skip("a PostgreSQL server does not run as root, and there is no other user")
        shutil.chown(home, user)
        as_user = ["setpriv", f"--reuid={user}", f"--regid={pwd.getpwnam(user).pw_gid}", "--clear-groups"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = str(home / "data")
    options = f"-h 127.0.0.1 -p {port} -k {home} -c fsync=off"

    def call(*arguments: str) -> None:
        subprocess.run([*as_user, control, "-D", data, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=home)

    call("init", "-o", "--auth=trust --username=tester")
    call("start", "-w", "-o", options, "-l", str(home / "log"))
    try:
        yield f"postgresql+psycopg2://tester@127.0.0.1:{port}/postgres"
    finally:
        call("stop", "-m", "immediate")
        shutil.rmtree(home)


def test_a_real_server_holds_the_study_and_a_killed_worker_loses_nothing(tmp_path: Path, server: str) -> None:
    tried, study = killed_search(tmp_path, storage=server)
    assert_the_killed_trial_was_made_again(tried, study, tmp_path)
    assert not (tmp_path / "optuna.db").exists()
    # another command, elsewhere, takes part in the same study
    task = Valley(tmp_path / "elsewhere" / "trials", 16, 0)
    more = metaopt_optuna.TPE(heartbeat=1, storage=server).run(task)
    assert more[:14] == tried and len(more) == 16
