"""`metaopt tune` finds values for the spaces of a spec, goes on after a crash, and gives them as text to paste."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import warm

import metaopt
from metaopt.cli import main
from metaopt.lab import tune
from metaopt.lab.search import draw, points, with_rate_space
from metaopt.lab.tuning import tuner_named
from metaopt.specs.parsing import parse
from metaopt.specs.spaces import spaces_of
from metaopt.tuner import Point, Task, Tried

SPEC = "sgd(lr=log(1e-2, 1), momentum=uniform(0, 0.9))"
SMALL = {"problem": "xor", "trials": 6, "steps": 12}
COMMAND = ["tune", SPEC, "--problem", "xor", "--trials", "40", "--steps", "60", "--jobs", "1", "--out", "found"]


def results(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())


# ---- what is drawn


def test_points_fill_the_cube_and_more_of_them_begin_alike() -> None:
    drawn = points(3, 64, 0)
    assert drawn[:20] == points(3, 20, 0) and drawn[:20] != points(3, 20, 1)
    for axis in range(3):  # a Sobol sequence of 64 has one point in each 64th of every axis
        assert sorted(int(point[axis] * 64) for point in drawn) == list(range(64))


def test_settings_are_drawn_from_a_space_for_others_to_train() -> None:
    drawn = draw(parse("adamw(lr=warmup(log(1e-4, 1e-1), 0.1)) | lookahead(k=integers(2, 5))"), 8, 3)
    assert len({str(pipeline) for pipeline in drawn}) == 8
    assert not any(spaces_of(pipeline) for pipeline in drawn)
    with pytest.raises(metaopt.SpecError, match="nothing to choose"):
        draw(parse("sgd"), 8, 0)


def test_without_a_space_the_rate_of_each_base_is_searched() -> None:
    assert list(spaces_of(with_rate_space(parse("sgd(lr=0.1) | lookahead")))) == ["lr"]
    split = parse("partition({'matrix': muon, '*': adamw}) | ema")
    assert list(spaces_of(with_rate_space(split))) == ["matrix: lr", "*: lr"]
    assert with_rate_space(parse(SPEC)) == parse(SPEC)
    for text in ("adamw(lr=cosine(0.1))", "switch(sgd, 5, adamw)"):
        with pytest.raises(metaopt.SpecError, match="write a space into it"):
            with_rate_space(parse(text))


# ---- the search


def test_the_best_setting_is_a_spec_that_trains_to_its_loss(tmp_path: Path) -> None:
    found = tune(SPEC, **SMALL, out=tmp_path)
    assert len(found.trials) == 6 and found.evaluations == 6 * 12
    assert found.best.loss == min(trial.loss for trial in found.trials)
    problem = metaopt.xor()  # type: ignore[attr-defined]
    torch.manual_seed(1000)
    model = problem.model(1000)
    opt = metaopt.build(model, found.best.spec, total_steps=12)
    for _, batch in zip(range(12), problem.batches(1000), strict=False):
        opt.zero_grad()
        problem.loss(model, batch).backward()
        opt.step()
    assert problem.evaluate(model)["loss"] == pytest.approx(found.best.loss, rel=1e-5)
    assert results(tmp_path) == found.to_dict()


@pytest.mark.slow
def test_another_number_of_processes_and_a_second_run_give_the_same(tmp_path: Path) -> None:
    one = tune(SPEC, **SMALL, out=tmp_path / "one")
    written = (tmp_path / "one" / "results.json").read_bytes()
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "one" / "trials").glob("*.json")}
    assert tune(SPEC, **SMALL, out=tmp_path / "one") == one
    assert {file: file.stat().st_mtime_ns for file in files} == files and len(files) == 6
    status, _, errors = warm.run(
        [*COMMAND[:4], "--trials", "6", "--steps", "12", "--out", "two", "--jobs", "2"], tmp_path
    )
    assert status == 0, errors
    assert (tmp_path / "two" / "results.json").read_bytes() == written
    assert tune(SPEC, **SMALL, out=tmp_path / "other", seed=1) != one


@pytest.mark.slow
def test_a_killed_search_goes_on_to_the_same_result(tmp_path: Path) -> None:
    command = warm.Command(COMMAND, tmp_path)
    trials = tmp_path / "found" / "trials"
    began = time.monotonic()
    while len(list(trials.glob("*.json"))) < 3:
        assert command.running() and time.monotonic() - began < 120
        time.sleep(0.005)
    command.kill()
    done = {file.name for file in trials.glob("*.json")}
    assert not (tmp_path / "found" / "results.json").exists() and 3 <= len(done) < 40
    found = tune(SPEC, problem="xor", trials=40, steps=60, out=tmp_path / "found")
    assert done <= {file.name for file in trials.glob("*.json")}
    whole = tune(SPEC, problem="xor", trials=40, steps=60, out=tmp_path / "whole")
    assert found == whole
    assert (tmp_path / "found/results.json").read_bytes() == (tmp_path / "whole/results.json").read_bytes()


@pytest.mark.slow
def test_halving_gives_most_settings_up_and_counts_what_it_spent(tmp_path: Path) -> None:
    found = tune(SPEC, problem="xor", trials=9, steps=90, method="halving", out=tmp_path)
    lengths = [trial.evaluations for trial in found.trials]
    assert lengths == [10] * 9 + [30] * 3 + [90]
    assert found.evaluations == sum(lengths) and found.best == found.trials[-1] and found.best.whole
    kept = {trial.spec for trial in sorted(found.trials[:9], key=lambda trial: trial.loss)[:3]}
    assert {trial.spec for trial in found.trials[9:12]} == kept
    # a whole run is what it is without halving
    alone = tune(SPEC, problem="xor", trials=9, steps=90, method="sobol(near=0)", out=tmp_path / "alone")
    assert found.best in alone.trials


class Formula(Task):
    """A search whose losses are a formula of the values."""

    def __init__(self, spaces: str, formula: Any, trials: int, seed: int = 0) -> None:
        self.spaces, self.formula = spaces_of(parse(f"sgd({spaces})")), formula
        self.trials, self.seed, self.jobs, self.budget = trials, seed, 1, 100
        self.name, self.folder = "formula", Path("nowhere")

    def points(self, count: int) -> list[Point]:
        return points(len(self.spaces), count, self.seed)

    def losses(self, tried: Sequence[Tried]) -> list[float]:
        return [self.loss(each) for each in tried]

    def loss(self, tried: Tried) -> float:
        return float(self.formula(*self.values(tried.point).values()))


def bowl(lr: float, momentum: float, weight_decay: float) -> float:
    """Return a bowl over three axes, of which two act together; its least value is 0."""
    x, y, z = math.log10(lr) + 1.3, momentum - 0.8, math.log10(weight_decay) + 2.0
    return x * x + 4.0 * y * y + 0.3 * z * z + 2.0 * x * y


def test_a_gaussian_process_comes_nearer_than_boxes_and_these_nearer_than_even_settings() -> None:
    spaces = "lr=log(1e-4, 1), momentum=uniform(0, 1), weight_decay=log(1e-3, 1)"
    tasks = [Formula(spaces, bowl, 24, seed) for seed in range(3)]
    gp, boxes, even = (
        median(min(map(task.loss, tuner_named(method).run(task))) for task in tasks)
        for method in ("gp", "sobol", "sobol(near=0)")
    )
    assert gp < boxes / 2 < even / 4


def test_a_gaussian_process_tries_every_option_before_one_again() -> None:
    for options in ("integers(1, 7)", "choice(7, 3, 6, 4, 1, 5, 2)"):
        task = Formula(f"lr=log(1e-2, 1), momentum={options}", lambda lr, momentum: momentum, 3)
        alone = Formula(f"momentum={options}", lambda momentum: momentum, 9)
        tried = [next(iter(alone.values(each.point).values())) for each in tuner_named("gp").run(alone)]
        distinct = len(set(tried[:3]))
        assert set(tried[: 3 + 7 - distinct]) == set(range(1, 8)) and len(tried) == 9
        assert len(tuner_named("gp").run(task)) == 3


def test_a_gaussian_process_leaves_the_half_that_diverges() -> None:
    for seed in range(4):
        task = Formula("lr=log(1e-2, 1)", lambda lr: lr if lr < 0.1 else math.inf, 6, seed)
        losses = [task.loss(each) for each in tuner_named("gp").run(task)]
        assert sum(map(math.isfinite, losses[:2])) == 1 and sum(map(math.isfinite, losses[2:])) == 4


def test_two_gradients_an_update_are_counted_as_two(tmp_path: Path) -> None:
    found = tune("sam | sgd(lr=log(1e-2, 1))", problem="xor", trials=3, steps=36, method="halving", out=tmp_path)
    assert [trial.evaluations for trial in found.trials] == [4, 4, 4, 12, 36]


@pytest.mark.slow
def test_long_runs_are_halved_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(
            [
                "tune",
                SPEC,
                "--problem",
                "xor",
                "--trials",
                "2",
                "--steps",
                "2000",
                "--jobs",
                "1",
                "--out",
                str(tmp_path),
            ]
        )
    assert "by halving" in capsys.readouterr().out


# ---- the command


def test_the_command_prints_the_best_spec_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*COMMAND[:4], "--trials", "6", "--steps", "12", "--jobs", "1", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    printed = capsys.readouterr().out
    best = tune(SPEC, **SMALL, out=tmp_path).best
    assert not ended.value.code and printed.splitlines()[0] == best.spec == str(parse(best.spec))
    assert "6 settings, 72 gradient evaluations, by gp" in printed
    with pytest.raises(SystemExit):
        main([*arguments, "--json"])
    assert json.loads(capsys.readouterr().out) == results(tmp_path)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"spec": "sgd(lr=log(1e-2, 1))"}, "holds a search with another spec: choose another --out"),
        ({"seed": 5}, "holds a search with another seed"),
        ({"method": "halving"}, "holds a search with another method"),
        ({"method": "cosine(0.1)"}, "'cosine' is a schedule, not a tuner. See: metaopt list tuners"),
        ({"method": "sobul"}, "no tuner is called 'sobul'. Did you mean sobol?"),
        ({"method": "sobol(near=1)"}, "sobol: near must be >= 0, < 1, got 1.0"),
        ({"spec": "adamw(betas=(choice(0.9, 1.5), 0.999))"}, "Invalid beta parameter at index 0: 1.5"),
        ({"trials": 1}, "trials must be 2 or more"),
        ({"problem": "xir"}, "no problem is called 'xir'"),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    tune(SPEC, **{**SMALL, "trials": 2}, out=tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(metaopt.MetaoptError) as refused:
        tune(**{"spec": SPEC, **SMALL, **changed, "out": tmp_path})
    assert told in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_settings_that_diverge_are_worst_and_all_of_them_are_an_error(tmp_path: Path) -> None:
    found = tune("sgd(lr=choice(0.1, 1e39))", problem="xor", trials=6, steps=12, out=tmp_path)
    assert math.isfinite(found.best.loss) and any(math.isinf(trial.loss) for trial in found.trials)
    assert any(trial["loss"] is None for trial in results(tmp_path)["trials"])
    with pytest.raises(metaopt.ProblemError, match="every trial diverged or failed"):
        tune("sgd(lr=choice(1e39, 1e40))", problem="xor", trials=4, steps=12, out=tmp_path / "all")
