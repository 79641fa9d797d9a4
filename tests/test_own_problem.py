"""A problem of one's own in one call: what a training script has is trained, tuned and compared as it is."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import metaopt
from metaopt.cli import main
from metaopt.errors import ProblemError
from metaopt.lab import compare, train, tune
from metaopt.lab.comparison import run_comparison
from metaopt.lab.own.problem import GivenProblem
from metaopt.lab.plan import plan_comparison
from metaopt.testing import cases, prove

X = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > X[:, 1]).long()


class Noisy(TensorDataset):
    """Examples with an augmentation that draws from the global generators."""

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(3) + 0.01 * random.random(), y


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))


def accuracy(model: nn.Module, batch: Any) -> torch.Tensor:
    return (model(batch[0]).argmax(-1) == batch[1]).float().mean()


def loaders() -> dict[str, Any]:
    return {
        "batches": DataLoader(Noisy(X[:40], Y[:40]), 8, shuffle=True, generator=torch.Generator()),
        "validation": DataLoader(TensorDataset(X[40:], Y[40:]), 6),
    }


given = metaopt.problem(
    model=network,
    **loaders(),
    loss=nn.CrossEntropyLoss(),
    metrics={"accuracy": accuracy},
    targets={"accuracy": 0.8},
    steps=30,
)


def test_a_problem_in_one_call_passes_the_checks_of_problems() -> None:
    (case,) = cases(f"{__name__}:given")
    results = prove(case)
    assert len(results) >= 5
    assert [(r.check, r.reason) for r in results if r.status != "passed"] == []


def test_batches_depend_on_seed_and_number_and_leave_all_global_generators() -> None:
    before = torch.get_rng_state(), random.getstate()
    first = list(itertools.islice(given.batches(3), 12))
    # two runs that take turns disturb neither
    turns = zip(given.batches(3), given.batches(4), strict=False)
    together = [a for a, _ in itertools.islice(turns, 12)]
    resumed = list(itertools.islice(given.batches(3, start=7), 5))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    torch.testing.assert_close(together, first, rtol=0, atol=0)
    torch.testing.assert_close(resumed, first[7:], rtol=0, atol=0)
    assert not torch.equal(next(given.batches(4))[0], first[0][0])
    # passes are shuffled anew, and each holds every example once
    passes = [torch.cat([y for _, y in first[i : i + 5]]) for i in (0, 5)]
    assert not torch.equal(*passes)
    assert [int(y.sum()) for y in passes] == [int(Y[:40].sum())] * 2


def test_the_loss_of_torch_is_the_loss_by_hand_and_means_weigh_examples() -> None:
    model = given.model(0)
    inputs, targets = next(given.batches(0))
    torch.manual_seed(0)
    loss = given.loss(model, (inputs, targets))
    torch.manual_seed(0)
    assert loss.item() == nn.functional.cross_entropy(model(inputs), targets).item()
    # batches of 6, 6, 6 and 2: of the 20 examples validation has the first and the third six
    model.eval()
    for split, chosen in (("validation", [*range(6), *range(12, 18)]), ("test", [*range(6, 12), 18, 19])):
        x, y = X[40:][chosen], Y[40:][chosen]
        found = given.evaluate(model, split)
        assert found["loss"] == pytest.approx(nn.functional.cross_entropy(model(x), y).item(), rel=1e-6)
        assert found["accuracy"] == pytest.approx(accuracy(model, (x, y)).item())


def test_it_is_trained_tuned_and_compared(tmp_path: Path) -> None:
    result = train(given, "adamw(lr=0.01)")
    assert result.stack.updates == 30
    assert result.evaluation["accuracy"] > 0.5
    found = tune("sgd(lr=log(1e-3, 1))", problem=given, trials=2, steps=4, out=tmp_path / "tuned")
    assert found.problem == f"{__name__}:given"
    plan = plan_comparison(problem=found.problem, specs=["sgd", "adamw"], studies=2, trials=1, steps=4, out=tmp_path)
    (run, *_) = run_comparison(plan).contenders[0].runs
    assert run["failed"] is None and run["test"].keys() == {"loss", "accuracy"}


@pytest.mark.slow
def test_a_module_in_the_current_folder_is_compared_by_other_processes(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "own_training.py").write_text(
        "import torch, metaopt\n"
        "data = [(torch.ones(4, 2) * i, torch.ones(4, 1) * i) for i in range(4)]\n"
        "line = metaopt.problem(model=lambda: torch.nn.Linear(2, 1), batches=data, validation=data,\n"
        "                       loss=torch.nn.functional.mse_loss)\n"
    )
    monkeypatch.chdir(tmp_path)
    command = ["compare", "--problem", "own_training:line", "-o", "sgd", "-o", "adam", "--out", "runs"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--studies", "2", "--trials", "1", "--steps", "2", "--jobs", "2"])
    assert not ended.value.code
    assert json.loads((tmp_path / "runs" / "results.json").read_text())["contenders"][0]["runs"][0]["failed"] is None


def made(**changed: Any) -> GivenProblem:
    data = [(X, Y), (X, Y)]
    call = {"model": network, "batches": data, "validation": data, "loss": nn.CrossEntropyLoss()} | changed
    return metaopt.problem(**call)  # type: ignore[return-value]


def test_data_are_made_and_split_once_for_all_seeds() -> None:
    def split() -> Any:
        return DataLoader(random_split(TensorDataset(X, Y), [40, 20])[0], 40)

    problem = made(batches=split, validation=split)
    expected = sorted(next(problem.batches(0))[0].flatten().tolist())
    assert sorted(next(problem.batches(5))[0].flatten().tolist()) == expected


def test_a_generator_function_gives_every_seed_batches_of_its_own() -> None:
    def drawn() -> Any:
        for _ in range(3):
            yield torch.randn(4, 3), torch.zeros(4, dtype=torch.long)

    problem = made(batches=drawn, validation=drawn)
    batches = list(itertools.islice(problem.batches(1), 6))
    assert len({batch[0].sum().item() for batch in batches}) == 6
    torch.testing.assert_close(next(problem.batches(1, start=4)), batches[4], rtol=0, atol=0)
    assert problem.evaluate(problem.model(0)) == problem.evaluate(problem.model(0))


def test_a_module_is_where_every_seed_begins_and_is_not_changed() -> None:
    trained = network().eval()
    problem = made(model=trained)
    first, second = problem.model(0), problem.model(1)
    assert first is not trained and first.training and not trained.training
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_other_data_weights_or_code_have_another_hash() -> None:
    same = made().data_hash()
    assert made().data_hash() == same
    others = [
        made(batches=[(X + 1, Y)]),
        made(validation=[(X, Y), (X, 1 - Y)]),
        made(model=lambda: nn.Linear(3, 2)),
        made(loss=lambda model, batch: model(batch[0]).square().mean()),
        made(loss=lambda model, batch: model(batch[0]).square().mean() * 2),
        made(metrics={"accuracy": accuracy}),
    ]
    assert len({same, *(problem.data_hash() for problem in others)}) == 7


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "an iterator": ({"batches": iter([1])}, "begun again"),
    "no validation": ({"validation": None}, "validation is missing"),
    "no batches": ({"batches": []}, "must hold a batch or more"),
    "one batch for two": ({"validation": [(X, Y)]}, "test must hold a batch or more"),
    "a data set": ({"batches": TensorDataset(X, Y)}, "give batch_size"),
    "a vector": ({"loss": lambda model, batch: model(batch[0])}, "loss must be one number"),
    "no loss": ({"loss": None}, "loss is missing"),
    "a loss of torch": ({"batches": [X]}, r"batches of \(inputs, targets\)"),
    "a target": ({"targets": {"f1": 0.5}}, "targets must name one of loss, got f1"),
    "no model": ({"model": lambda: None}, "model must be a module"),
    "a number": ({"steps": 0}, "must be 1 or more"),
    "a metric": ({"metrics": {"loss": accuracy}}, "none of them called loss"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_sentence(mistake: str) -> None:
    changed, message = MISTAKES[mistake]
    with pytest.raises(ProblemError, match=message):
        problem = made(**changed)
        model = problem.model(0)
        problem.loss(model, next(problem.batches(0)))
        problem.evaluate(model)
        problem.evaluate(model, "test")


def test_a_problem_that_other_processes_cannot_find_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match="top level of a module"):
        compare(["sgd", "adam"], problem=made(), out=tmp_path)
    with pytest.raises(ProblemError, match="cannot be imported"):
        compare(["sgd", "adam"], problem="no_such_module:name", out=tmp_path)
    with pytest.raises(ProblemError, match=r"has no 'givn'. Did you mean given\?"):
        compare(["sgd", "adam"], problem=f"{__name__}:givn", out=tmp_path)
    with pytest.raises(ProblemError, match="takes no hyperparameters"):
        compare(["sgd", "adam"], problem=f"{__name__}:given(width=3)", out=tmp_path)
