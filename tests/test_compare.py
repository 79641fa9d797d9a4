"""A comparison, run for real on small problems."""

import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
import metaopt
from metaopt import MetaoptError
from metaopt.cli import main
from metaopt.lab.compare import run_comparison
from metaopt.lab.holding import held, scratch_of
from metaopt.lab.plan import Plan, plan_comparison
from metaopt.lab.report import remarks, rows, write_results
from metaopt.lab.statistics import verdicts
from metaopt.registry import registry

SPECS = ("sgd(momentum=0.9)", "sgd(momentum=0.9) | lookahead(k=5)")


def small(out: Path, **changed: Any) -> Plan:
    asked: dict[str, Any] = {
        "problem": "noisy_quadratic",
        "specs": SPECS,
        "baseline": None,
        "seeds": 3,
        "steps": 20,
        "lrs": 3,
        "tune": True,
        "device": "cpu",
        "out": out,
        "jobs": 1,
    }
    return plan_comparison(**{**asked, **changed})


def compared(out: Path, *extra: str) -> int:
    arguments = ["compare", "--problem", "noisy_quadratic", "--seeds", "3", "--steps", "20", "--lrs", "3"]
    contenders = [word for spec in SPECS for word in ("-o", spec)]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, *contenders, "--jobs", "1", "--out", str(out), *extra])
    return int(ended.value.code or 0)


def table(plan: Plan) -> list[dict[str, str]]:
    return rows(plan, run_comparison(plan))


# ---- what is run


def test_every_contender_gets_the_same_trials_and_seeds(tmp_path: Path) -> None:
    first, second = run_comparison(small(tmp_path))
    assert list(first.tuning) == list(second.tuning)
    assert [run["seed"] for run in first.runs] == [run["seed"] for run in second.runs] == [0, 1, 2]


def test_each_row_names_its_weights_and_both_losses_are_kept(tmp_path: Path) -> None:
    plan = small(tmp_path, steps=18)  # fast and slow weights are equal after every fifth
    contenders = run_comparison(plan)
    assert [row["weights"] for row in rows(plan, contenders)] == ["fast", "averaged (lookahead)"]
    plain, averaged = contenders[0].runs[0], contenders[1].runs[0]
    assert plain["fast"] == plain["evaluated"]
    assert averaged["fast"] != averaged["evaluated"]
    assert contenders[1].losses[0] == averaged["evaluated"]["loss"]


def test_of_nested_averages_the_outermost_counts(tmp_path: Path) -> None:
    specs = ("sgd(momentum=0.9)", "sgd(momentum=0.9) | lookahead(k=2) | lookahead(k=3, label='outer')")
    assert table(small(tmp_path, specs=specs, tune=False))[1]["weights"] == "averaged (outer)"


def test_a_base_that_shows_other_weights_than_it_trains_is_asked_for_them(tmp_path: Path) -> None:
    schedulefree = pytest.importorskip("schedulefree")
    metaopt.register(optimizers={"adamw_schedule_free": schedulefree.AdamWScheduleFree})
    plan = small(tmp_path, specs=("adamw", "adamw_schedule_free(lr=0.1)"), tune=False)
    contenders = run_comparison(plan)
    assert rows(plan, contenders)[1]["weights"] == "AdamWScheduleFree's own"
    run = contenders[1].runs[0]
    assert run["evaluated"]["loss"] != run["fast"]["loss"]


def test_the_default_grid_is_five_rates_and_its_bounds_can_be_set(tmp_path: Path) -> None:
    assert small(tmp_path, lrs=5).rates == pytest.approx((1e-3, 4.73e-3, 2.24e-2, 1.06e-1, 0.5))
    assert small(tmp_path, lrs=3, lr_min=1e-4, lr_max=1e-2).rates == pytest.approx((1e-4, 1e-3, 1e-2))
    assert small(tmp_path, lrs=1, lr_min=0.1, lr_max=0.1).rates == (0.1,)


class Twice(metaopt.Wrapper):
    """Evaluates the loss two times, as SAM does."""

    def around(self, closure, groups):  # type: ignore[no-untyped-def]
        closure()
        return closure()


def test_the_budget_is_gradient_evaluations(tmp_path: Path) -> None:
    metaopt.register(wrappers={"evaluates_twice": Twice})
    specs = ("sgd", "evaluates_twice | sgd", "lbfgs(max_iter=3)")
    contenders = run_comparison(small(tmp_path, specs=specs, tune=False, steps=21))
    runs = [contender.runs[0] for contender in contenders]
    assert [run["evaluations"] for run in runs[:2]] == [21, 20]
    assert [run["updates"] for run in runs[:2]] == [21, 10]
    assert runs[2]["updates"] < runs[2]["evaluations"] <= 21
    assert [point[0] for point in runs[1]["curve"]][-1] == 20


def test_accumulated_gradients_cost_evaluations_and_the_run_is_as_long_as_its_updates(tmp_path: Path) -> None:
    specs = ("sgd(lr=0.1)", "accumulate(4) | sgd(lr=linear(0.1, 0.0))", "evaluates_twice | accumulate(3) | sgd(lr=0.1)")
    metaopt.register(wrappers={"evaluates_twice": Twice})
    contenders = run_comparison(small(tmp_path, specs=specs, tune=False, steps=40))
    runs = [contender.runs[0] for contender in contenders]
    assert [(run["updates"], run["evaluations"]) for run in runs] == [(40, 40), (10, 40), (6, 36)]
    # one look at the weights per update, and the schedule ends with the run: its last rate is that after 9 of 10
    assert [at for at, _ in runs[1]["curve"]] == [4 * update for update in range(1, 11)]
    assert dict(runs[1]["points"])[10]["train/learning_rate"] == pytest.approx(0.01)


def test_every_run_has_one_thread_and_the_others_are_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *a, **k: seen.add(torch.get_num_threads()) or step(*a, **k))
    torch.set_num_threads(2)
    try:
        plan = small(tmp_path, specs=("sgd", "sgd(momentum=0.5)"))
        seen.clear()
        run_comparison(plan)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert seen == {1}
    assert plan.circumstances["threads"] == 1


# ---- what is kept


def test_a_comparison_that_lost_a_result_runs_only_what_is_missing(tmp_path: Path) -> None:
    before = run_comparison(small(tmp_path))
    finished = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "trials").glob("*.json")}
    lost = sorted(finished)[0]
    lost.unlink()
    scratch_of(tmp_path / "trials" / "half-written.1").write_text("{")
    after = run_comparison(small(tmp_path))
    assert [contender.losses for contender in after] == [contender.losses for contender in before]
    assert [path for path, time in finished.items() if os.stat(path).st_mtime_ns != time] == [lost]
    assert not list((tmp_path / "trials").glob("*.tmp"))


def test_a_result_of_other_circumstances_is_not_taken(tmp_path: Path) -> None:
    plan = small(tmp_path)
    known = plan.trial(0, 0.1, 0, final=True).key()
    for name, other in (("threads", 2), ("data", "another split"), ("code", "another"), ("device", "cuda (another)")):
        assert (
            known
            != dataclasses.replace(plan, circumstances={**plan.circumstances, name: other})
            .trial(0, 0.1, 0, final=True)
            .key()
        ), name
    for name in ("torch", "metaopt", "python"):
        versions = {**plan.circumstances["versions"], name: "0.0"}
        other_plan = dataclasses.replace(plan, circumstances={**plan.circumstances, "versions": versions})
        assert known != other_plan.trial(0, 0.1, 0, final=True).key(), name
    assert known == small(tmp_path, seeds=5, jobs=2, lrs=4).trial(0, 0.1, 0, final=True).key()


def test_a_plugin_that_was_edited_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = tmp_path / "edited_between.py"
    plugin.write_text(
        "import torch\nfrom metaopt import hookimpl\n"
        "class Edited(torch.optim.SGD):\n    '''Descend.'''\n"
        "@hookimpl\ndef metaopt_optimizers():\n    return {'edited_between': Edited}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    registry.load_plugin_module("edited_between")
    asked = {"specs": ("sgd", "edited_between"), "plugins": ("edited_between",)}
    before = small(tmp_path, **asked).trial(1, 0.1, 0, final=True)
    assert before == small(tmp_path, **asked).trial(1, 0.1, 0, final=True)
    plugin.write_text(plugin.read_text() + "# edited\n")
    assert before.key() != small(tmp_path, **asked).trial(1, 0.1, 0, final=True).key()


def test_results_hold_what_a_reader_needs_to_repeat_them(tmp_path: Path) -> None:
    assert compared(tmp_path, "--steps", "18") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["versions"]["torch"] == torch.__version__
    assert (results["threads"], results["device"]) == (1, "cpu")
    assert results["data"] == metaopt.noisy_quadratic().data_hash()
    second = results["contenders"][1]
    # every default is written out: it may be another one in the next version
    assert "nesterov=False" in second["expanded"] and "alpha=0.5" in second["expanded"]
    assert second["runs"][0]["fast"]["loss"] != second["runs"][0]["evaluated"]["loss"]


# ---- what is said


def test_a_comparison_leaves_report_results_and_pictures(tmp_path: Path) -> None:
    assert compared(tmp_path) == 0
    assert len(json.loads((tmp_path / "results.json").read_text())["contenders"]) == 2
    report = (tmp_path / "report.md").read_text()
    assert "at least 6 seeds; this run has 3, so no difference of any size could be shown" in report
    for picture in ("curves.png", "sensitivity.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_fixed_rates_name_no_winner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = small(tmp_path, specs=("sgd(lr=0.1)", "sgd(lr=0.001)"), tune=False, seeds=8)
    contenders = run_comparison(plan)
    assert contenders[1].verdict is not None and contenders[1].verdict.word == "worse"
    assert rows(plan, contenders)[1]["verdict"] == "settings differ"
    assert any("rank settings, not optimizers" in remark for remark in remarks(plan, contenders))


def test_runs_that_diverged_are_counted_and_cost_the_contender(tmp_path: Path) -> None:
    plan = small(tmp_path, problem="rosenbrock", specs=("sgd(lr=0.001)", "sgd(lr=10.0)"), tune=False, seeds=7, steps=60)
    contenders = run_comparison(plan)
    fine, lost = rows(plan, contenders)
    assert (fine["diverged"], lost["diverged"]) == ("0 of 7", "7 of 7")
    assert (lost["test loss"], lost["target reached"]) == ("diverged", "0 of 7")
    assert lost["verdict"] == "settings differ (by ranks)"
    assert any(remark.startswith("7 of 7 runs of sgd(lr=10.0) diverged") for remark in remarks(plan, contenders))
    write_results(plan, contenders)
    assert json.loads((tmp_path / "results.json").read_text())["contenders"][1]["losses"] == ["inf"] * 7


def test_a_mean_is_not_taken_over_the_finite_runs_alone(tmp_path: Path) -> None:
    plan = small(tmp_path, tune=False)
    contenders = run_comparison(plan)
    evaluated = contenders[0].runs[0]["evaluated"]
    kept = sorted(run["evaluated"]["loss"] for run in contenders[0].runs[1:])
    evaluated["loss"] = None
    row = rows(plan, contenders)[0]
    # of three the median, with the one that diverged as the largest
    assert row["test loss"] == f"median {kept[1]:.4f}"
    assert row["diverged"] == "1 of 3"


def test_a_run_that_misses_the_target_is_censored(tmp_path: Path) -> None:
    plan = small(tmp_path, tune=False, seeds=5)
    contenders = run_comparison(plan)
    for run, reached in zip(contenders[0].runs, (10, None, 14, 12, None), strict=True):
        run["reached"] = reached
    for run, reached in zip(contenders[1].runs, (10, None, None, 12, None), strict=True):
        run["reached"] = reached
    assert [row["target reached"] for row in rows(plan, contenders)] == ["3 of 5, median 14", "2 of 5"]


def test_a_best_rate_at_the_edge_says_that_the_grid_is_too_small(tmp_path: Path) -> None:
    plan = small(tmp_path, lr_min=1e-5, lr_max=1e-4)
    said = [remark for remark in remarks(plan, run_comparison(plan)) if remark.startswith("Grid too small")]
    assert len(said) == 2 and all("--lr-max" in remark for remark in said)


@pytest.mark.parametrize(
    ("difference", "at_edge", "told"),
    [
        (-1.0, {0}, "better on a grid too small for the baseline"),
        (-1.0, {1}, "better"),  # more rates could only make it better still
        (1.0, {1}, "worse on a grid too small for it"),
        (1.0, {0}, "worse"),
        (0.0, {0, 1}, "no difference shown"),
    ],
)
def test_a_verdict_says_where_the_beaten_one_had_no_fair_grid(
    tmp_path: Path, difference: float, at_edge: set[int], told: str
) -> None:
    plan = small(tmp_path, seeds=8)
    contenders = run_comparison(plan)
    base = [1.0 + 0.01 * seed for seed in range(8)]
    noise = [0.001 * (-1) ** seed for seed in range(8)]
    losses = [base, [loss + difference + off for loss, off in zip(base, noise, strict=True)]]
    for position, verdict in enumerate(verdicts(losses)):
        contenders[position].verdict = verdict
        contenders[position].at_edge = position in at_edge
    assert rows(plan, contenders)[1]["verdict"] == told


def test_the_rate_in_a_spec_that_the_grid_replaces_is_named(tmp_path: Path) -> None:
    plan = small(tmp_path, specs=("sgd(lr=0.7)", "adam"))
    assert any("replaces lr=0.7" in remark for remark in remarks(plan, run_comparison(plan)))


def test_times_are_shown_for_runs_made_one_at_a_time(tmp_path: Path) -> None:
    plan = small(tmp_path)
    contenders = run_comparison(plan)
    assert float(rows(plan, contenders)[0]["seconds"]) >= 0
    contenders[0].runs[0]["jobs"] = 2
    assert all("seconds" not in row for row in rows(plan, contenders))


# ---- what is refused


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"baseline": "adamw"}, "must be one of the contenders"),
        ({"specs": ("sgd",)}, "two contenders"),
        ({"specs": ("sgd", "adam", "sgd()")}, "the same, sgd"),
        ({"specs": ("sgd", "sgd(lr=constant(0.1))")}, "schedule owns the learning rate"),
        ({"specs": ("sgd", "clip_grad_norm | sgd")}, "max_norm"),
        ({"specs": ("sgd", "sparse_adam")}, "sparse_adam.*cannot train noisyquadratic.*RuntimeError"),
        ({"specs": ("sgd", "evaluates_twice | sgd"), "steps": 1}, "more gradient evaluations than --steps 1"),
        ({"specs": ("sgd", "accumulate(4) | sgd"), "steps": 3}, "than --steps 3 .accumulated 3 of 4"),
        ({"seeds": 1}, "--seeds must be 2 or more.*got 1"),
        ({"lrs": 0}, "--lrs must be 1 or more.*got 0"),
        ({"jobs": 0}, "--jobs must be 1 or more.*got 0"),
        ({"steps": 0}, "--steps must be 1 or more.*got 0"),
        ({"lr_min": 0.0}, "lr-min"),
        ({"lr_min": 1.0, "lr_max": 0.1}, "lr-min"),
        ({"lr_max": math.inf}, "lr-min"),
        ({"lr_min": math.nan}, "lr-min"),
        ({"lrs": 1}, "--lrs must be 1 if --lr-min equals"),
        ({"lrs": 2, "lr_min": 0.1, "lr_max": 0.1}, "--lrs must be 1 if --lr-min equals"),
        ({"problem": "nonsense"}, "no problem is called"),
        ({"device": "nosuch"}, "present: cpu"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(
    tmp_path: Path, asked: dict[str, Any], told: str
) -> None:
    metaopt.register(wrappers={"evaluates_twice": Twice})
    with pytest.raises(MetaoptError, match=told):
        small(tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_two_comparisons_do_not_write_into_one_folder(tmp_path: Path) -> None:
    # the lock is a process's own, so another process asks
    program = (
        "import sys, pathlib\nfrom metaopt.lab.holding import held\n"
        "with held(pathlib.Path(sys.argv[1]), 'a comparison'):\n    print('entered')\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with held(tmp_path, "a comparison"):
        refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode != 0 and "another process is writing a comparison" in refused.stderr
    assert subprocess.run(command, capture_output=True, text=True).stdout == "entered\n"


# ---- TensorBoard


def read_back(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_there_is_a_tensorboard_run_per_seed_and_one_of_their_median(tmp_path: Path) -> None:
    contenders = run_comparison(small(tmp_path))
    folder = tmp_path / "tensorboard"
    assert sorted(path.name for path in folder.glob("[0-9]*")) == ["1-sgd", "2-sgd-lookahead"]
    assert sorted(path.name for path in (folder / "2-sgd-lookahead").iterdir()) == [
        "median",
        "seed-0",
        "seed-1",
        "seed-2",
    ]
    seeds = [read_back(folder / "2-sgd-lookahead" / f"seed-{seed}") for seed in range(3)]
    together = read_back(folder / "2-sgd-lookahead" / "median")
    assert set(together) == set(seeds[0]) >= {"train/loss", "validation/loss", "test/loss", "lookahead/distance"}
    for tag in ("train/loss", "validation/loss", "test/loss"):
        middle = [sorted(seed[tag][i][1] for seed in seeds)[1] for i in range(len(together[tag]))]
        assert [value for _, value in together[tag]] == pytest.approx(middle)
        assert [step for step, _ in together[tag]] == [step for step, _ in seeds[0][tag]]
    assert seeds[1]["test/loss"] == [(20, pytest.approx(contenders[1].losses[1]))]


def test_the_median_run_counts_what_diverged_as_infinite(tmp_path: Path) -> None:
    run_comparison(small(tmp_path, problem="rosenbrock", specs=("sgd(lr=0.001)", "sgd(lr=10.0)"), tune=False))
    lost = read_back(tmp_path / "tensorboard" / "2-sgd" / "median")
    assert lost["test/loss"][0][1] == math.inf
    assert lost["validation/loss"][-1][1] == math.inf


def test_the_runs_of_an_earlier_comparison_are_not_left_beside(tmp_path: Path) -> None:
    run_comparison(small(tmp_path))
    shutil.rmtree(tmp_path / "tensorboard" / "1-sgd" / "seed-0")
    run_comparison(small(tmp_path, specs=(SPECS[0], "adam"), seeds=2))
    folder = tmp_path / "tensorboard"
    assert sorted(path.name for path in folder.glob("[0-9]*")) == ["1-sgd", "2-adam"]
    # a result that was read, not made again, has its run all the same
    assert sorted(path.name for path in (folder / "1-sgd").iterdir()) == ["median", "seed-0", "seed-1"]


def test_a_folder_that_no_comparison_made_is_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / "tensorboard" / "months of work"
    kept.mkdir(parents=True)
    with pytest.raises(MetaoptError, match="no comparison made it"):
        run_comparison(small(tmp_path))
    assert kept.exists()


# ---- several processes


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    below = [int(word) for word in found.stdout.split()]
    return below + [grandchild for child in below for grandchild in children(child)]


def until(question, seconds: float = 120.0) -> bool:  # type: ignore[no-untyped-def]
    patience = time.monotonic() + seconds
    while not question():
        if time.monotonic() > patience:
            return False
        time.sleep(0.02)
    return True


def test_a_comparison_removes_its_own_half_written_files_and_nobody_else_s(tmp_path: Path) -> None:
    (tmp_path / "trials").mkdir()
    others = [tmp_path / "thesis.tmp", tmp_path / "report.md.tmp", tmp_path / "trials" / "a.1.tmp"]
    left = [scratch_of(tmp_path / "report.md"), scratch_of(tmp_path / "trials" / "a.1")]
    for path in (*others, *left):
        path.write_text("written by somebody")
    assert compared(tmp_path) == 0
    assert [path.read_text() for path in others] == ["written by somebody"] * 3
    assert not any(path.exists() for path in left)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_that_was_killed_from_outside_is_told(tmp_path: Path) -> None:
    plan = small(tmp_path, problem="rosenbrock", specs=("sgd", "adam"), steps=3000, jobs=2)
    before = set(multiprocessing.active_children())

    def kill_one(done: int, total: int) -> None:
        worker = next(iter(set(multiprocessing.active_children()) - before))
        worker.kill()

    with pytest.raises(MetaoptError, match=r"killed from outside.*fewer --jobs than 2"):
        run_comparison(plan, kill_one)
    assert set(multiprocessing.active_children()) == before


def heed_interrupts() -> None:
    """Let the process be interrupted, also if these tests run where SIGINT is ignored (nohup, some CI)."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_an_interrupted_comparison_goes_on_and_leaves_no_process_behind(tmp_path: Path) -> None:
    asked = {"problem": "rosenbrock", "specs": ("sgd", "adam"), "seeds": 4, "steps": 400, "lrs": 3}
    command = [sys.executable, "-m", "metaopt", "compare", "--problem=rosenbrock", "-o", "sgd", "-o", "adam"]
    command += ["--seeds=4", "--steps=400", "--lrs=3", "--jobs=2", f"--out={tmp_path / 'killed'}"]

    def finished() -> int:
        return len(list((tmp_path / "killed" / "trials").glob("*.json")))

    for end in (signal.SIGINT, signal.SIGKILL):
        with (tmp_path / "errors").open("w") as errors:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, preexec_fn=heed_interrupts)
        before = finished()
        assert until(lambda before=before: finished() > before or process.poll() is not None)  # noqa: B023
        assert process.poll() is None, "it was over before it could be interrupted: make the runs longer"
        workers = children(process.pid)
        assert len(workers) >= 2
        process.send_signal(end)
        status = process.wait(60)
        outlived = [worker for worker in workers if not until(lambda worker=worker: not running(worker), 20)]
        for worker in outlived:
            os.kill(worker, signal.SIGKILL)
        assert not outlived, "workers outlived their parent"
        if end == signal.SIGINT:
            told = (tmp_path / "errors").read_text()
            # where it took long, lines of progress stand before it
            assert status == 130 and told.count("metaopt: ") == 1
            assert told.splitlines()[-1].startswith("metaopt: interrupted: ")
            assert "interrupted" in told and "the same command goes on from there" in told
    kept = finished()
    assert 2 <= kept < 20
    continued = run_comparison(small(tmp_path / "killed", **asked))
    whole = run_comparison(small(tmp_path / "whole", **asked))
    assert [contender.losses for contender in continued] == [contender.losses for contender in whole]
    assert [contender.tuning for contender in continued] == [contender.tuning for contender in whole]
