"""Suites: problems that are compared on together, those that come with metaopt and those of a plugin."""

import itertools
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import metaopt
from metaopt.cli import main
from metaopt.errors import PluginError, ProblemError
from metaopt.lab.named import problem_named, suite_named
from metaopt.registry import Registry


def test_the_small_suite_has_eight_kinds_of_problems_or_more_with_targets() -> None:
    problems = [problem_named(text) for text in suite_named("small")]
    assert len({type(problem) for problem in problems}) == len(problems) >= 8
    assert all(len(problem.targets) == 1 for problem in problems)
    assert {type(problem).__name__ for problem in problems} >= {"Digits", "CharLM", "Xor"}


def test_an_unknown_suite_is_told_with_those_that_are_there() -> None:
    with pytest.raises(ProblemError, match=r"must be one of small, got 'smal'\. Did you mean small\?"):
        suite_named("smal")


def plugin(**suites: Any) -> ModuleType:
    module = ModuleType("suites_of_a_plugin")

    @metaopt.hookimpl
    def metaopt_suites() -> Any:
        return suites

    module.metaopt_suites = metaopt_suites  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(
    ("offered", "message"),
    [({"small": ["xor"]}, "offered twice"), ({"mine": "xor"}, "must return"), ({"mine": [3]}, "must return")],
)
def test_a_suite_that_cannot_be_used_is_told(offered: Any, message: str, monkeypatch: Any) -> None:
    registry = Registry()
    monkeypatch.setitem(sys.modules, "suites_of_a_plugin", plugin(**offered))
    registry.load_plugin_module("suites_of_a_plugin")
    with pytest.raises(PluginError, match=message):
        registry.suites()


def test_the_exact_solution_has_no_loss_in_the_heat_equation() -> None:
    class Exact(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, points: torch.Tensor) -> torch.Tensor:
            x, t = points.unbind(1)
            return (self.factor * (math.pi * x).sin() * (-(math.pi**2) * t / 10).exp())[:, None]

    problem = problem_named("heat")
    assert problem.evaluate(Exact())["loss"] < 1e-10
    assert problem.loss(Exact(), next(problem.batches(0))).item() < 1e-10
    assert problem.evaluate(problem.model(0))["loss"] > 0.1


def test_sparse_gradients_of_the_factorisation_are_the_dense_ones() -> None:
    weights = []
    for text in ("factorisation(sparse=True)", "factorisation"):
        problem = problem_named(text)
        model = problem.model(0)
        opt = metaopt.build(model.named_parameters(), "sgd(lr=0.5)")
        for batch in itertools.islice(problem.batches(0), 3):
            opt.zero_grad()
            problem.loss(model, batch).backward()
            opt.step()
        gradients = [p.grad for name, p in model.named_parameters() if name != "mean"]
        assert all(g is not None and g.is_sparse == ("True" in text) for g in gradients)
        weights.append([p.detach() for p in model.parameters()])
    # most rows have no gradient in a batch
    assert (gradients[0] == 0).all(1).float().mean() > 0.4
    torch.testing.assert_close(weights[0], weights[1])


def test_batch_norm_is_evaluated_with_its_statistics_and_keeps_them() -> None:
    problem = problem_named("digits_batch_norm")
    model = problem.model(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert problem.evaluate(model) == problem.evaluate(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    problem.loss(model, next(problem.batches(0)))
    assert not torch.equal(before["first.1.running_mean"], model.state_dict()["first.1.running_mean"])
    assert model.training


@pytest.mark.slow
def test_a_command_compares_on_all_problems_of_a_suite(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "two_toys.py").write_text(
        "from metaopt import hookimpl\n\n\n@hookimpl\ndef metaopt_suites():\n"
        "    return {'toys': ['rosenbrock', 'noisy_quadratic(dimensions=3)']}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    command = ["compare", "--suite", "toys", "--plugin", "two_toys", "-o", "sgd", "-o", "adam", "--out", "runs"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--studies", "2", "--trials", "1", "--steps", "3", "--jobs", "1"])
    assert not ended.value.code
    assert {"rosenbrock", "noisy_quadratic-dimensions-3"} <= {path.name for path in (tmp_path / "runs").iterdir()}
