"""A comparison, run for real on small problems."""

import dataclasses
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

import metaopt
from metaopt import MetaoptError
from metaopt.cli import main
from metaopt.lab.bands import quartiles
from metaopt.lab.comparison import Comparison, judge, run_comparison
from metaopt.lab.holding import held, scratch_of
from metaopt.lab.ledger import NAME
from metaopt.lab.plan import Plan, plan_comparison
from metaopt.lab.rates import rate_of, with_rate
from metaopt.lab.report import remarks, rows
from metaopt.lab.results import document, write_results
from metaopt.lab.runs import names
from metaopt.lab.savings import evaluations_saved
from metaopt.lab.trial import has_diverged
from metaopt.registry import registry
from metaopt.specs.parsing import parse

pytestmark = pytest.mark.slow

SPECS = ("sgd(momentum=0.9)", "sgd(momentum=0.9) | lookahead(k=5)")


def small(out: Path, **changed: Any) -> Plan:
    asked: dict[str, Any] = {
        "problem": "noisy_quadratic",
        "specs": SPECS,
        "studies": 3,
        "trials": 2,
        "steps": 20,
        "out": out,
    }
    return plan_comparison(**{**asked, **changed})


def compared(out: Path, *extra: str) -> int:
    arguments = ["compare", "--problem", "noisy_quadratic", "--studies", "3", "--steps", "20", "--trials", "2"]
    contenders = [word for spec in SPECS for word in ("-o", spec)]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, *contenders, "--jobs", "1", "--out", str(out), *extra])
    return int(ended.value.code or 0)


def table(plan: Plan) -> list[dict[str, str]]:
    return rows(run_comparison(plan))


# ---- what is run


def test_a_study_is_a_tuning_with_a_placement_of_its_own_and_the_seed_of_its_number(tmp_path: Path) -> None:
    comparison = run_comparison(small(tmp_path, trials=4))
    placements = set()
    for contender in comparison.contenders:
        for study in contender.studies:
            rates = list(study.trials)
            assert all(trial["seed"] == study.number for trial in study.trials.values())
            # one rate in each quarter of the range, equally far apart
            assert rates == sorted(rates) and [rates[i + 1] / rates[i] for i in range(3)] == pytest.approx(
                [500**0.25] * 3, rel=0.01
            )
            assert 1e-3 <= rates[0] < 1e-3 * 500**0.25
            placements.add(rates[0])
    assert len(placements) == 6


def test_the_best_of_a_study_is_chosen_on_validation_data_and_judged_on_test_data(tmp_path: Path) -> None:
    contender = run_comparison(small(tmp_path, problem="xor")).contenders[0]
    for study, loss in zip(contender.studies, contender.losses, strict=True):
        losses = {rate: trial["validation"]["loss"] for rate, trial in study.trials.items()}
        assert study.rate == min(losses, key=lambda rate: losses[rate])
        assert loss == study.run["test"]["loss"] != losses[study.rate]


def test_a_contender_s_studies_do_not_depend_on_the_others(tmp_path: Path) -> None:
    first = small(tmp_path)
    second = small(tmp_path, specs=("adamw", *SPECS), studies=5, jobs=2)
    assert first.study(1, 2) == second.study(2, 2)


def test_what_a_budget_can_show_is_said_before_it_is_spent(tmp_path: Path) -> None:
    assert "A verdict takes 6 studies: no difference can be shown" in small(tmp_path).promise()
    said = small(tmp_path, studies=10, trials=5).promise()
    assert "2 contenders, 10 studies of 5 trials: 100 runs of 20 gradient evaluations" in said
    assert "10 studies show a difference of 1.0 standard deviations" in said and "80%; one of 0.5 takes 36" in said


# ---- schedules and several bases: the rate is one number


@pytest.mark.parametrize(
    ("spec", "tuned"),
    [
        ("sgd(momentum=0.9)", "sgd(momentum=0.9, lr=0.5)"),
        ("clip_grad_norm(1.0) | adamw(lr=3.0)", "clip_grad_norm(max_norm=1.0) | adamw(lr=0.5)"),
        ("adamw(lr=warmup(cosine(3e-4), 0.05))", "adamw(lr=warmup(schedule=cosine(start=0.5), steps=0.05))"),
        (
            "sgd(lr=sequence(0.1, 10, cosine(0.2), 20, 0.01))",
            "sgd(lr=sequence(0.25, 10, cosine(start=0.5), 20, 0.025))",
        ),
        ("adam(lr=noam(64, 20))", "adam(lr=noam(d_model=64, warmup=20, factor=17.8885))"),
        (
            "partition({'* & matrix': muon(lr=0.02), '*': adamw(lr=cosine(0.01))})",
            "partition({'* & matrix': muon(lr=0.5), '*': adamw(lr=cosine(start=0.25))})",
        ),
        ("switch(adamw(lr=1e-3), 20, sgd(lr=0.1))", "switch(adamw(lr=0.5), 20, sgd(lr=50.0))"),
    ],
)
def test_a_schedule_and_several_bases_scale_as_one(spec: str, tuned: str) -> None:
    found = with_rate(spec, 0.5, 100)
    assert parse(found) == parse(tuned)
    assert rate_of(found, 100) == pytest.approx(0.5, rel=1e-4)


class Offset(metaopt.Schedule):
    """v(t) = start + 1: it does not scale with its own number."""

    start: float = metaopt.hyper(doc="less one")

    def curve(self, run: int | None, span: int | None) -> Any:
        return lambda t: self.start + 1.0


def test_a_schedule_that_does_not_scale_with_its_own_numbers_is_scaled_from_outside() -> None:
    metaopt.register(schedules={"offset_by_one": Offset})
    found = with_rate("sgd(lr=warmup(offset_by_one(1.0), 10))", 0.5, 100)
    assert found == "sgd(lr=scale(schedule=warmup(schedule=offset_by_one(start=1.0), steps=10), factor=0.25))"
    assert rate_of(found, 100) == pytest.approx(0.5)


def test_a_stack_with_a_schedule_is_compared_and_its_row_names_the_peak(tmp_path: Path) -> None:
    plan = small(tmp_path, specs=("sgd(momentum=0.9)", "sgd(lr=warmup(cosine(0.1), 0.1), momentum=0.9)"))
    comparison = run_comparison(plan)
    for study in comparison.contenders[1].studies:
        values = [values["train/learning_rate"] for _, values in study.run["points"]]
        assert max(values) == pytest.approx(study.rate, rel=1e-4)
    assert any("replaces lr=warmup" in remark and "largest value is tuned" in remark for remark in remarks(comparison))


def test_each_row_names_its_weights_and_both_losses_are_kept(tmp_path: Path) -> None:
    plan = small(tmp_path, steps=18)  # fast and slow weights are equal after every fifth
    comparison = run_comparison(plan)
    assert [row["weights"] for row in rows(comparison)] == ["fast", "averaged (lookahead)"]
    plain, averaged = (contender.runs[0] for contender in comparison.contenders)
    assert plain["fast"] == plain["test"]
    assert averaged["fast"] != averaged["test"]
    assert comparison.contenders[1].losses[0] == averaged["test"]["loss"]


def test_of_nested_averages_the_outermost_counts(tmp_path: Path) -> None:
    specs = ("sgd(momentum=0.9)", "sgd(momentum=0.9) | lookahead(k=2) | lookahead(k=3, label='outer')")
    assert table(small(tmp_path, specs=specs, tune=False))[1]["weights"] == "averaged (outer)"


def test_a_base_that_shows_other_weights_than_it_trains_is_asked_for_them(tmp_path: Path) -> None:
    schedulefree = pytest.importorskip("schedulefree")
    metaopt.register(optimizers={"adamw_schedule_free": schedulefree.AdamWScheduleFree})
    plan = small(tmp_path, specs=("adamw", "adamw_schedule_free(lr=0.1)"), tune=False)
    comparison = run_comparison(plan)
    assert rows(comparison)[1]["weights"] == "AdamWScheduleFree's own"
    run = comparison.contenders[1].runs[0]
    assert run["test"]["loss"] != run["fast"]["loss"]


class Twice(metaopt.Wrapper):
    """Evaluates the loss two times, as SAM does."""

    def around(self, closure, groups):  # type: ignore[no-untyped-def]
        closure()
        return closure()


def test_the_budget_is_gradient_evaluations(tmp_path: Path) -> None:
    metaopt.register(wrappers={"evaluates_twice": Twice})
    specs = ("sgd", "evaluates_twice | sgd", "lbfgs(max_iter=3)")
    contenders = run_comparison(small(tmp_path, specs=specs, tune=False, steps=21)).contenders
    runs = [contender.runs[0] for contender in contenders]
    assert [run["evaluations"] for run in runs[:2]] == [21, 20]
    assert [run["updates"] for run in runs[:2]] == [21, 10]
    assert runs[2]["updates"] < runs[2]["evaluations"] <= 21
    assert [point[0] for point in runs[1]["curve"]][-1] == 20


def test_accumulated_gradients_cost_evaluations_and_the_run_is_as_long_as_its_updates(tmp_path: Path) -> None:
    specs = ("sgd(lr=0.1)", "accumulate(4) | sgd(lr=linear(0.1, 0.0))", "evaluates_twice | accumulate(3) | sgd(lr=0.1)")
    metaopt.register(wrappers={"evaluates_twice": Twice})
    contenders = run_comparison(small(tmp_path, specs=specs, tune=False, steps=40)).contenders
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
    assert [contender.losses for contender in after.contenders] == [c.losses for c in before.contenders]
    assert [path for path, time in finished.items() if os.stat(path).st_mtime_ns != time] == [lost]
    assert not list((tmp_path / "trials").glob("*.tmp"))


def test_a_result_of_other_circumstances_is_not_taken(tmp_path: Path) -> None:
    plan = small(tmp_path)
    known = plan.trial(0, 0.1, 0).key()

    def elsewhere(**other: Any) -> str:
        own = ({**plan.own[0], **other}, plan.own[1])
        return dataclasses.replace(plan, own=own).trial(0, 0.1, 0).key()

    for name, other in (("threads", 2), ("data", "another split"), ("code", "another"), ("device", "cuda (another)")):
        assert known != elsewhere(**{name: other}), name
    for name in ("torch", "metaopt", "python"):
        assert known != elsewhere(versions={**plan.circumstances["versions"], name: "0.0"}), name
    assert known == small(tmp_path, studies=5, jobs=2, trials=4).trial(0, 0.1, 0).key()


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
    before = small(tmp_path, **asked).trial(1, 0.1, 0)
    assert before == small(tmp_path, **asked).trial(1, 0.1, 0)
    plugin.write_text(plugin.read_text() + "# edited\n")
    assert before.key() != small(tmp_path, **asked).trial(1, 0.1, 0).key()


def test_a_module_that_a_plugin_imports_was_edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = tmp_path / "helps_a_plugin.py"
    helper.write_text("FACTOR = 1.0\n")
    (tmp_path / "is_helped.py").write_text(
        "import torch\nfrom metaopt import hookimpl\n"
        "class Helped(torch.optim.SGD):\n    def step(self, closure=None):\n"
        "        from helps_a_plugin import FACTOR\n        return super().step(closure)\n"
        "@hookimpl\ndef metaopt_optimizers():\n    return {'is_helped': Helped}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    registry.load_plugin_module("is_helped")
    asked = {"specs": ("sgd", "is_helped"), "tune": False}
    small(tmp_path, **asked)  # its first step imports the helper
    before = small(tmp_path, **asked).trial(1, 0.1, 0)
    helper.write_text("FACTOR = 2.0\n")
    after = small(tmp_path, **asked)
    assert before.key() != after.trial(1, 0.1, 0).key()
    # it is no matter of the other contender's
    assert after.trial(0, 0.1, 0) == small(tmp_path, specs=("sgd", "adam")).trial(0, 0.1, 0)


def test_results_hold_what_a_reader_needs_to_repeat_them(tmp_path: Path) -> None:
    assert compared(tmp_path, "--steps", "18") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["versions"]["torch"] == torch.__version__
    assert (results["threads"], results["device"]) == (1, "cpu")
    assert results["data"] == metaopt.noisy_quadratic().data_hash()
    second = results["contenders"][1]
    # every default is written out: it may be another one in the next version
    assert all("nesterov=False" in spec and "alpha=0.5" in spec for spec in second["expanded"])
    assert second["runs"][0]["fast"]["loss"] != second["runs"][0]["test"]["loss"]


# ---- what is said


def test_a_comparison_leaves_report_results_and_pictures(tmp_path: Path) -> None:
    assert compared(tmp_path) == 0
    assert len(json.loads((tmp_path / "results.json").read_text())["contenders"]) == 2
    report = (tmp_path / "report.md").read_text()
    assert "at least 6 studies; this comparison has 3, so no difference of any size could be shown" in report
    for picture in ("curves.png", "differences.png", "sensitivity.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_fixed_rates_name_no_winner(tmp_path: Path) -> None:
    comparison = run_comparison(small(tmp_path, specs=("sgd(lr=0.1)", "sgd(lr=0.001)"), tune=False, studies=8))
    verdict = comparison.contenders[1].verdict
    assert verdict is not None and verdict.word == "worse"
    assert rows(comparison)[1]["verdict"] == "settings differ"
    assert any("rank settings, not optimizers" in remark for remark in remarks(comparison))


def test_studies_that_diverged_are_counted_and_cost_the_contender(tmp_path: Path) -> None:
    asked = {"problem": "rosenbrock", "specs": ("sgd(lr=0.001)", "sgd(lr=10.0)")}
    comparison = run_comparison(small(tmp_path, **asked, tune=False, studies=7, steps=60))
    fine, lost = rows(comparison)
    assert (fine["diverged"], lost["diverged"]) == ("0 of 7 trials", "7 of 7 trials")
    assert (lost["test loss"], lost["target reached"]) == ("diverged", "0 of 7")
    assert lost["verdict"] == "settings differ"
    assert any(remark.startswith("7 of 7 studies of sgd(lr=10.0) diverged") for remark in remarks(comparison))
    write_results(comparison)
    assert json.loads((tmp_path / "results.json").read_text())["contenders"][1]["losses"] == ["inf"] * 7


def changed(comparison: Comparison, position: int, losses: list[float], reached: list[float]) -> None:
    """Write other results into the best runs of a contender."""
    for study, loss, at in zip(comparison.contenders[position].studies, losses, reached, strict=True):
        study.run["test"]["loss"] = loss if math.isfinite(loss) else None
        study.run["reached"] = int(at) if math.isfinite(at) else None


def test_a_mean_is_not_taken_over_the_finite_studies_alone(tmp_path: Path) -> None:
    comparison = run_comparison(small(tmp_path))
    changed(comparison, 0, [1.0, math.inf, 3.0], [math.inf] * 3)
    # of three the median, with the one that diverged as the largest
    assert rows(comparison)[0]["test loss"] == "median 3.0000 [1.0000, inf]"
    changed(comparison, 0, [1.0, 2.0, 3.0], [math.inf] * 3)
    assert rows(comparison)[0]["test loss"] == "2.0000 ± 1.0000"


def test_accuracy_and_its_spread_are_in_the_table(tmp_path: Path) -> None:
    row = rows(run_comparison(small(tmp_path, problem="xor")))[0]
    assert float(row["accuracy"].split(" ± ")[0]) > 0.3


def test_a_study_that_misses_the_target_is_censored(tmp_path: Path) -> None:
    comparison = run_comparison(small(tmp_path, studies=5))
    changed(comparison, 0, [1.0] * 5, [10, math.inf, 14, 12, math.inf])
    changed(comparison, 1, [1.0] * 5, [10, math.inf, math.inf, 12, math.inf])
    assert [row["target reached"] for row in rows(comparison)] == ["3 of 5, median 14", "2 of 5"]


def test_the_time_to_the_target_has_a_verdict_of_its_own(tmp_path: Path) -> None:
    comparison = run_comparison(small(tmp_path, studies=8))
    losses = [1.0 + 0.01 * (-1) ** study for study in range(8)]
    changed(comparison, 0, losses, [90, 95, 100, 105, math.inf, 92, 97, math.inf])
    changed(comparison, 1, losses, [50, 52, 61, 63, 70, 51, 66, 80])
    judge(comparison)
    row = rows(comparison)[1]
    assert row["verdict"] == "no difference shown"
    assert row["time to target"].startswith("sooner: ") and row["time to target"].endswith("p 0.00781")
    # infinitely many evaluations more are no number
    changed(comparison, 0, losses, [math.inf] * 4 + [90, 95, 100, 105])
    judge(comparison)
    assert rows(comparison)[1]["time to target"] == "sooner: p 0.00781"
    changed(comparison, 0, losses, [math.inf] * 2 + [50, 61, 63, 70, 51, 66])
    changed(comparison, 1, losses, [50, math.inf, 50, 61, 63, 70, 51, 66])
    judge(comparison)
    assert rows(comparison)[1]["time to target"] == "no difference shown: +0, p 1"
    # a tie of two that miss it shows nothing, and where nobody meets it there is nothing to say
    changed(comparison, 0, losses, [math.inf] * 8)
    changed(comparison, 1, losses, [math.inf] * 8)
    judge(comparison)
    assert "time to target" not in rows(comparison)[1]


def test_evaluations_saved_are_how_much_earlier_the_better_one_has_the_other_s_loss() -> None:
    def run(*losses: float) -> dict[str, Any]:
        curve = [(10 * (i + 1), loss) for i, loss in enumerate(losses)]
        return {"curve": curve, "evaluations": 10 * len(losses), "validation": {"loss": losses[-1]}}

    fast, slow = run(4.0, 1.0, 0.5, 0.4), run(4.0, 3.0, 2.5, 2.5)
    # from 4 at 10 to 1 at 20 it passes 2.5 at 15
    assert evaluations_saved([fast], [slow]) == 25.0
    assert evaluations_saved([slow], [fast]) == -25.0
    assert evaluations_saved([fast, slow, fast], [slow, slow, fast]) == 0.0


@pytest.mark.parametrize(
    ("range_", "flag", "end"), [((1e-6, 1e-4), "--lr-max", "highest"), ((1.0, 100.0), "--lr-min", "lowest")]
)
def test_studies_that_are_best_at_an_end_say_that_the_range_is_too_small(
    tmp_path: Path, range_: tuple[float, float], flag: str, end: str
) -> None:
    comparison = run_comparison(small(tmp_path, lr_min=range_[0], lr_max=range_[1], trials=8, studies=4, steps=5))
    assert {contender.edge for contender in comparison.contenders} == {end}
    said = [remark for remark in remarks(comparison) if remark.startswith("Range too small")]
    assert len(said) == 2 and all(flag in remark for remark in said)
    assert rows(comparison)[0]["lr"].endswith("(edge)")


@pytest.mark.parametrize(
    ("difference", "at_edge", "told"),
    [
        (-1.0, {0}, "better on a range too small for the baseline"),
        (-1.0, {1}, "better"),  # more rates could only make it better still
        (1.0, {1}, "worse on a range too small for it"),
        (1.0, {0}, "worse"),
        (0.0, {0, 1}, "no difference shown"),
    ],
)
def test_a_verdict_says_where_the_beaten_one_had_no_fair_range(
    tmp_path: Path, difference: float, at_edge: set[int], told: str
) -> None:
    comparison = run_comparison(small(tmp_path, studies=8, steps=2, trials=1))
    base = [2.0 + 0.01 * study for study in range(8)]
    changed(comparison, 0, base, [math.inf] * 8)
    changed(comparison, 1, [x + difference + 0.001 * (-1) ** i for i, x in enumerate(base)], [math.inf] * 8)
    judge(comparison)
    for position, contender in enumerate(comparison.contenders):
        contender.edge = "highest" if position in at_edge else None
    assert rows(comparison)[1]["verdict"] == told


def test_the_rate_in_a_spec_that_tuning_replaces_is_named(tmp_path: Path) -> None:
    comparison = run_comparison(small(tmp_path, specs=("sgd(lr=0.7)", "adam"), steps=2))
    assert any("replaces lr=0.7" in remark for remark in remarks(comparison))


def test_times_are_shown_for_runs_made_one_at_a_time(tmp_path: Path) -> None:
    comparison = run_comparison(small(tmp_path, steps=2))
    assert float(rows(comparison)[0]["seconds"]) >= 0
    comparison.contenders[0].runs[0]["jobs"] = 2
    assert all("seconds" not in row for row in rows(comparison))


# ---- a trial that fails is a result


class FailsAbove(torch.optim.SGD):
    """Raises where its rate is high, as a decomposition that does not converge does."""

    def step(self, closure: Any = None) -> Any:
        if self.param_groups[0]["lr"] > 0.05:
            raise RuntimeError("linalg.eigh: the algorithm failed to converge")
        return super().step(closure)


class NoMemoryAbove(torch.optim.SGD):
    """Runs out of memory where its rate is high."""

    def step(self, closure: Any = None) -> Any:
        if self.param_groups[0]["lr"] > 0.05:
            raise MemoryError
        return super().step(closure)


@pytest.mark.parametrize(
    ("name", "part", "reason"),
    [("fails_above", FailsAbove, "failed to converge"), ("no_memory_above", NoMemoryAbove, "out of memory")],
)
def test_a_trial_that_raises_costs_its_contender_and_nobody_else(
    tmp_path: Path, name: str, part: type[torch.optim.Optimizer], reason: str
) -> None:
    metaopt.register(optimizers={name: part})
    asked = {"specs": ("sgd", name), "trials": 3, "steps": 5}
    comparison = run_comparison(small(tmp_path, **asked))
    first, second = comparison.contenders
    assert not any(trial["failed"] for trial in first.trials)
    failed = [trial for trial in second.trials if trial["failed"]]
    assert failed and all(reason in trial["failed"] and trial["diverged"] for trial in failed)
    # each study keeps the best of what did not fail
    assert all(math.isfinite(loss) for loss in second.losses)
    assert f"{len(failed)} of them failed" in rows(comparison)[1]["diverged"]
    assert any(reason in remark and "--retry-failed" in remark for remark in remarks(comparison))
    # it is kept, and made again only if somebody asks
    times = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "trials").glob("*.json")}
    assert run_comparison(small(tmp_path, **asked)).contenders[1].losses == second.losses
    assert times == {path: os.stat(path).st_mtime_ns for path in times}
    run_comparison(small(tmp_path, **asked), retry_failed=True)
    assert sum(os.stat(path).st_mtime_ns != time for path, time in times.items()) == len(failed)


@pytest.mark.parametrize(
    ("loss", "initial", "lost"),
    [
        *((math.nan, 1.0, True), (math.inf, 1.0, True), (10.1, 1.0, True), (9.9, 1.0, False), (8.2e14, 8.5, True)),
        *((-1.0, -2.0, False), (17.0, -2.0, True), (5.0, 0.0, False)),
    ],
)
def test_a_run_that_explodes_and_stays_finite_has_diverged(loss: float, initial: float, lost: bool) -> None:
    assert has_diverged(loss, initial) == lost


def test_an_exploded_run_is_counted_and_the_rule_is_written(tmp_path: Path) -> None:
    comparison = run_comparison(small(tmp_path, specs=("sgd(lr=0.1)", "sgd(lr=3.0)"), tune=False, steps=10))
    fast = [run["fast"]["loss"] for run in comparison.contenders[1].runs]
    assert all(math.isfinite(loss) and loss > 30 for loss in fast)
    assert comparison.contenders[1].losses == [math.inf] * 3
    assert any("more than ten times" in remark for remark in remarks(comparison))


def test_a_file_that_holds_no_result_is_none(tmp_path: Path) -> None:
    before = run_comparison(small(tmp_path))
    paths = sorted((tmp_path / "trials").glob("*.json"))
    for path, content in zip(paths, ("{}", "[]", "", "null", '{"failed": null}'), strict=False):
        path.write_text(content)
    after = run_comparison(small(tmp_path))
    assert [c.losses for c in after.contenders] == [c.losses for c in before.contenders]


# ---- what is refused


class HasNoRate(torch.optim.SGD):
    """Takes no learning rate."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"baseline": "adamw"}, "must be one of the contenders"),
        ({"specs": ("sgd",)}, "two contenders"),
        ({"specs": ("sgd", "adam", "sgd()")}, "the same, sgd"),
        ({"specs": ("sgd", "adadelta(lr=0.0)")}, "rate of adadelta must be > 0"),
        ({"specs": ("sgd", "has_no_lr")}, "has_no_lr has no lr"),
        ({"specs": ("sgd", "clip_grad_norm | sgd")}, "max_norm"),
        ({"specs": ("sgd", "sparse_adam")}, "sparse_adam.*cannot train noisyquadratic.*RuntimeError"),
        ({"specs": ("sgd", "evaluates_twice | sgd"), "steps": 1}, "more gradient evaluations than --steps 1"),
        ({"specs": ("sgd", "accumulate(4) | sgd"), "steps": 3}, "than --steps 3 .accumulated 3 of 4"),
        ({"studies": 1}, "--studies must be 2 or more.*got 1"),
        ({"studies": "many"}, "--studies must be a whole number or auto, got 'many'"),
        ({"trials": 0}, "--trials must be 1 or more.*got 0"),
        ({"jobs": 0}, "--jobs must be 1 or more.*got 0"),
        ({"steps": 0}, "--steps must be 1 or more.*got 0"),
        ({"lr_min": 0.0}, "lr-min"),
        ({"lr_min": 1.0, "lr_max": 0.1}, "lr-min"),
        ({"lr_max": math.inf}, "lr-min"),
        ({"lr_min": math.nan}, "lr-min"),
        ({"trials": 2, "lr_min": 0.1, "lr_max": 0.1}, "--trials must be 1 where --lr-min equals"),
        ({"problem": "nonsense"}, "no problem is called"),
        ({"device": "nosuch"}, "present: cpu"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(
    tmp_path: Path, asked: dict[str, Any], told: str
) -> None:
    metaopt.register(wrappers={"evaluates_twice": Twice}, optimizers={"has_no_lr": HasNoRate})
    with pytest.raises(MetaoptError, match=told):
        small(tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_two_comparisons_do_not_write_into_one_folder(tmp_path: Path) -> None:
    # the lock is a process's own, so another process asks
    with (
        held(tmp_path, "a comparison"),
        pytest.raises(MetaoptError, match="another process is writing a comparison"),
    ):
        warm.called(enter, tmp_path)
    assert warm.called(enter, tmp_path) == "entered"


def enter(folder: Path) -> str:
    with held(folder, "a comparison"):
        return "entered"


# ---- TensorBoard


def event_file(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def read_back(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = event_file(folder)
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def runs_in(folder: Path) -> list[str]:
    """Return the runs that TensorBoard finds there."""
    return sorted(str(events.parent.relative_to(folder)) for events in folder.rglob("*tfevents*"))


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A comparison that was written with all studies, then without; and the runs that it had the first time."""
    folder = tmp_path_factory.mktemp("shown")
    assert compared(folder, "--all-seeds") == 0
    runs = runs_in(folder / "tensorboard")
    assert compared(folder) == 0
    return folder, runs


def test_tensorboard_has_a_run_per_contender_and_one_of_the_whole(shown: tuple[Path, list[str]]) -> None:
    folder, with_studies = shown
    assert runs_in(folder / "tensorboard") == ["1-sgd", "2-sgd-lookahead", "comparison"]
    # single studies are more runs than TensorBoard selects by itself: only if they are asked for
    studies = [f"{name}/study-{n}" for name in ("1-sgd", "2-sgd-lookahead") for n in range(3)]
    assert with_studies == sorted(["1-sgd", "2-sgd-lookahead", "comparison", *studies])


def test_a_contender_s_run_is_the_median_of_its_studies_with_their_quartiles(tmp_path: Path) -> None:
    contenders = run_comparison(small(tmp_path, studies=5), all_seeds=True).contenders
    folder = tmp_path / "tensorboard" / "2-sgd-lookahead"
    studies = [read_back(folder / f"study-{number}") for number in range(5)]
    together = read_back(folder)
    tags = {"train/loss", "train/learning_rate", "validation/loss", "test/loss", "lookahead/distance"}
    assert set(studies[0]) >= tags
    ends = {f"quartiles/{tag}/{end}" for tag in studies[0] for end in ("lower", "upper")}
    assert set(together) == {*studies[0], *ends}
    for tag, points in studies[0].items():
        for place, shown in ((1, f"quartiles/{tag}/lower"), (2, tag), (3, f"quartiles/{tag}/upper")):
            expected = [sorted(study[tag][i][1] for study in studies)[place] for i in range(len(points))]
            assert [value for _, value in together[shown]] == pytest.approx(expected)
            assert [step for step, _ in together[shown]] == [step for step, _ in points]
    assert studies[1]["test/loss"] == [(20, pytest.approx(contenders[1].losses[1]))]


@pytest.mark.parametrize("studies", [2, 3, 4, 7, 10])
def test_quartiles_are_those_of_numpy_and_right_for_infinite_losses(studies: int) -> None:
    values = np.random.default_rng(0).normal(size=(studies, 5))
    expected = np.quantile(values, [0.25, 0.5, 0.75], axis=0, method="averaged_inverted_cdf")
    assert quartiles(values) == pytest.approx(expected)
    assert list(quartiles([math.inf] * studies)) == [math.inf] * 3
    assert quartiles([1.0, 2.0, math.inf, math.inf])[1] == math.inf  # half of them diverged


def test_runs_of_equal_parts_are_told_apart_by_their_arguments() -> None:
    specs = ["sgd", "sgd(momentum=0.9)", "sgd | lookahead", "clip_grad_norm(1.0) | adamw(lr=cosine(0.01))"]
    assert names(specs) == ["1-sgd", "2-sgd-momentum=0.9", "3-sgd-lookahead", "4-clip_grad_norm-adamw"]


def test_the_dashboard_has_a_band_per_contender(shown: tuple[Path, list[str]]) -> None:
    folder, _ = shown
    found = event_file(folder / "tensorboard" / "comparison")
    (written,) = found.Tensors("custom_scalars__config__")
    layout = Layout.FromString(written.tensor_proto.string_val[0])
    charts = {chart.title: chart.margin.series[0] for category in layout.category for chart in category.chart}
    assert layout.category[0].title == "validation: median and quartiles of 3 studies"
    band = charts["validation/loss"]
    assert (band.value, band.lower, band.upper) == (
        "validation/loss",
        "quartiles/validation/loss/lower",
        "quartiles/validation/loss/upper",
    )
    drawn = read_back(folder / "tensorboard" / "1-sgd")
    assert {tag for chart in charts.values() for tag in (chart.value, chart.lower, chart.upper)} >= {
        tag for tag in drawn if "test/" not in tag
    }


def test_the_run_of_the_whole_has_the_pictures_that_are_files_as_well(shown: tuple[Path, list[str]]) -> None:
    folder, _ = shown
    found = event_file(folder / "tensorboard" / "comparison")
    images = {tag.removeprefix("metaopt/"): found.Images(tag)[0] for tag in found.Tags()["images"]}
    assert set(images) == {"curves", "differences", "sensitivity"}
    for name, image in images.items():
        assert image.encoded_image_string == (folder / f"{name}.png").read_bytes()
        assert image.width > image.height > 100


def test_the_verdicts_are_a_run_of_their_own_that_programs_can_read(shown: tuple[Path, list[str]]) -> None:
    folder, _ = shown  # the second call has written it anew, once
    found = event_file(folder / "tensorboard" / "comparison")
    tags = [tag for tag in found.Tags()["tensors"] if tag.startswith("metaopt/")]
    texts = {tag: [e.tensor_proto.string_val[0].decode() for e in found.Tensors(tag)] for tag in tags}
    (table,) = texts["metaopt/verdicts/text_summary"]
    results = json.loads((folder / "results.json").read_text())
    read = json.loads(table)
    assert [row["contender"] for row in read["rows"]] == [contender["spec"] for contender in results["contenders"]]
    first, *others = read["rows"]
    assert first["verdict"] == "baseline" and first["difference"] is None and read["baseline"] == first["contender"]
    assert [row["p"] for row in others] == [
        contender["verdict"]["corrected_p"] for contender in results["contenders"][1:]
    ]
    (report,) = texts["metaopt/report/text_summary"]
    assert "![" not in report  # there are no files beside it
    for row in rows_of(folder / "report.md"):
        assert all(f"| {cell} " in report for cell in row)


def rows_of(report: Path) -> list[list[str]]:
    table = [line for line in report.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


def test_the_median_run_counts_what_diverged_as_infinite(tmp_path: Path) -> None:
    run_comparison(small(tmp_path, problem="rosenbrock", specs=("sgd(lr=0.001)", "sgd(lr=10.0)"), tune=False))
    lost = read_back(tmp_path / "tensorboard" / "2-sgd-lr=10.0")
    assert lost["test/loss"][0][1] == math.inf
    assert lost["validation/loss"][-1][1] == math.inf


# ---- a folder, its comparisons and its looks


def test_a_second_comparison_leaves_the_first_as_it_is(tmp_path: Path) -> None:
    assert compared(tmp_path) == 0
    written = {path: path.read_bytes() for path in tmp_path.glob("*.*") if path.is_file() and path.name != NAME}
    assert compared(tmp_path, "-o", "adam") == 0
    assert {path: path.read_bytes() for path in written} == written
    second = tmp_path / "comparison-2"
    assert len(json.loads((second / "results.json").read_text())["contenders"]) == 3
    assert (second / "report.md").exists() and (second / "tensorboard").is_dir()
    # each goes on in its own place
    assert compared(tmp_path) == 0 and compared(tmp_path, "-o", "adam") == 0
    assert not (tmp_path / "comparison-3").exists()


@pytest.mark.parametrize("name", ["report.md", "curves.png", "tensorboard/months of work", "results.json"])
def test_what_somebody_else_has_in_the_folder_is_left_alone(tmp_path: Path, name: str) -> None:
    kept = tmp_path / name
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("a thesis")
    (tmp_path / ".lock").write_text("another program's")
    assert compared(tmp_path) == 0
    assert kept.read_text() == "a thesis" and (tmp_path / ".lock").read_text() == "another program's"
    assert (tmp_path / "comparison-2" / "report.md").exists()


def test_more_studies_in_the_same_folder_are_another_look(tmp_path: Path) -> None:
    first = run_comparison(small(tmp_path))
    assert (first.level, first.earlier) == (0.05, [])
    second = run_comparison(small(tmp_path, studies=5))
    assert (second.level, second.earlier, second.folder) == (0.01, [3], tmp_path / "comparison-2")
    assert any("looked at before in this folder, with 3 studies" in remark for remark in remarks(second))
    third = run_comparison(small(tmp_path, studies=7))
    assert (third.level, third.earlier) == (0.002, [3, 5])
    # the same look is the same look, and another question is another question
    assert run_comparison(small(tmp_path, studies=5)).level == 0.01
    assert run_comparison(small(tmp_path)).level == 0.05
    assert run_comparison(small(tmp_path, steps=19)).level == 0.05


def test_declared_looks_stop_as_soon_as_it_is_clear(tmp_path: Path) -> None:
    asked = {"tune": False, "studies": "auto", "steps": 5}
    clear = run_comparison(small(tmp_path, specs=("sgd(lr=0.1)", "sgd(lr=0.001)"), **asked))
    assert clear.plan.looks == (8, 14, 20) and clear.studies == 8
    assert clear.level == pytest.approx(0.0229, abs=2e-4)
    assert any("Declared looks at 8, 14 and 20 studies" in remark for remark in remarks(clear))
    equal = run_comparison(small(tmp_path, specs=("sgd(lr=0.1)", "sgd(lr=0.1, dampening=0.5)"), **asked))
    assert equal.studies == 20


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


def test_a_trial_whose_process_is_killed_is_made_again(tmp_path: Path) -> None:
    asked = {"problem": "rosenbrock", "specs": ("sgd", "adam"), "steps": 1000, "trials": 2}
    before = set(multiprocessing.active_children())
    killed: list[Any] = []

    def kill_one(done: int, total: int) -> None:
        if not killed:
            killed.append(next(iter(set(multiprocessing.active_children()) - before)))
            killed[-1].kill()

    found = run_comparison(small(tmp_path / "killed", **asked, jobs=2), kill_one)
    assert killed and set(multiprocessing.active_children()) == before
    whole = run_comparison(small(tmp_path / "whole", **asked))
    assert not any(trial["failed"] for contender in found.contenders for trial in contender.trials)
    assert [c.losses for c in found.contenders] == [c.losses for c in whole.contenders]


ENDS_ITSELF = """
import os, signal
import torch
from metaopt import hookimpl


class EndsItself(torch.optim.SGD):
    # as a process is killed that takes all memory
    def step(self, closure=None):
        if self.param_groups[0]["lr"] > 0.3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(closure)


@hookimpl
def metaopt_optimizers():
    return {"ends_itself": EndsItself}
"""


def test_a_trial_that_gets_its_process_killed_each_time_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ends_itself_plugin.py").write_text(ENDS_ITSELF)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    registry.load_plugin_module("ends_itself_plugin")
    asked = {"specs": ("sgd", "ends_itself"), "plugins": ("ends_itself_plugin",), "trials": 10, "studies": 2}
    comparison = run_comparison(small(tmp_path / "out", **asked, jobs=2))
    fine, bad = comparison.contenders
    assert not any(trial["failed"] for trial in fine.trials)
    failed = {rate: trial["failed"] for study in bad.studies for rate, trial in study.trials.items()}
    assert any(failed.values())
    assert all(bool(why) == (rate > 0.3) for rate, why in failed.items() if rate is not None)
    assert all("killed 3 times from outside" in why for why in failed.values() if why)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_an_interrupted_comparison_goes_on_and_leaves_no_process_behind(tmp_path: Path) -> None:
    asked = {"problem": "rosenbrock", "specs": ("sgd", "adam"), "studies": 4, "steps": 150, "trials": 3}
    command = ["compare", "--problem=rosenbrock", "-o", "sgd", "-o", "adam"]
    command += ["--studies=4", "--steps=150", "--trials=3", "--jobs=2", f"--out={tmp_path / 'killed'}"]

    def finished() -> int:
        return len(list((tmp_path / "killed" / "trials").glob("*.json")))

    for end in (signal.SIGINT, signal.SIGKILL):
        before = finished()
        # as on a terminal, its workers are forks of a process that it has started
        run = warm.Command(command, tmp_path, own_server=True)
        assert until(lambda before=before, run=run: finished() > before or not run.running())
        assert run.running(), "it was over before it could be interrupted: make the runs longer"
        workers = children(run.process.pid or 0)
        assert len(workers) >= 2
        run.kill(end)
        status, _, errors = run.end()
        outlived = [worker for worker in workers if not until(lambda worker=worker: not running(worker), 20)]
        for worker in outlived:
            os.kill(worker, signal.SIGKILL)
        assert not outlived, "workers outlived their parent"
        if end == signal.SIGINT:
            # where it took long, lines of progress stand before it
            assert status == 130 and errors.count("metaopt: ") == 1
            assert errors.splitlines()[-1].startswith("metaopt: interrupted: ")
            assert "the same command goes on from there" in errors
    kept = finished()
    assert 2 <= kept < 24
    continued, whole = (run_comparison(small(tmp_path / name, **asked)) for name in ("killed", "whole"))
    assert without_times(document(continued)) == without_times(document(whole))


def without_times(found: Any) -> Any:
    """Return results without what may differ between two runs of one comparison: times, processes and places."""
    if isinstance(found, dict):
        return {k: without_times(v) for k, v in found.items() if k not in ("seconds", "where", "jobs", "out")}
    return [without_times(item) for item in found] if isinstance(found, list) else found
