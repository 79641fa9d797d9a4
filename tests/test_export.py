"""`metaopt export --form algoperf` writes a submission that trains through AlgoPerf's functions as the stack does."""

import enum
import itertools
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import metaopt
from metaopt.cli import main
from metaopt.ejecting.algoperf import submission
from metaopt.errors import SpecError

pytestmark = pytest.mark.slow

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()
HINT = 30


class Mode(enum.Enum):
    TRAIN = 0
    EVAL = 1


@pytest.fixture(autouse=True)
def algoperf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the names of AlgoPerf that a submission imports: the package is not on the index."""
    package, spec = ModuleType("algoperf"), ModuleType("algoperf.spec")
    spec.ForwardPassMode, package.spec = Mode, spec  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "algoperf", package)
    monkeypatch.setitem(sys.modules, "algoperf.spec", spec)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


class Workload:
    """A workload as algoperf/spec.py describes it, as far as a submission calls it."""

    step_hint = HINT
    metrics_logger = None

    def model_fn(
        self,
        params: Any,
        augmented_and_preprocessed_input_batch: Any,
        model_state: Any,
        mode: Any,
        rng: Any,
        update_batch_norm: bool,
        dropout_rate: float,
    ) -> Any:
        assert mode is Mode.TRAIN and update_batch_norm and dropout_rate == 0.1
        return params(augmented_and_preprocessed_input_batch["inputs"]), model_state

    def loss_fn(self, label_batch: Any, logits_batch: Any, mask_batch: Any = None, label_smoothing: float = 0.0) -> Any:
        losses = nn.functional.cross_entropy(
            logits_batch, label_batch, reduction="none", label_smoothing=label_smoothing
        )
        return {"summed": losses.sum(), "n_valid_examples": torch.tensor(len(losses)), "per_example": losses}


def batches() -> Any:
    return ({"inputs": X[at : at + 6], "targets": Y[at : at + 6]} for at in itertools.cycle((0, 6, 12, 18)))


SPECS = [
    "adamw(lr=0.01)",
    "clip_grad_norm(1.0) | adamw(lr=warmup(cosine(1e-2), 0.1), weight_decay=0.1) | lookahead(k=3)",
    "partition({'matrix': adamw(lr=warmup(cosine(1e-2), 0.1)), '*': sgd(lr=0.1)})",
    "partition({'matrix': adamw(lr=0.01) | lookahead(k=3), '*': sgd(lr=0.1)})",
    "sgd(lr=cosine(0.1), momentum=0.9) | ema(decay=0.9)",
]


@pytest.mark.parametrize("spec", SPECS)
def test_the_submission_trains_and_is_evaluated_as_the_stack(spec: str) -> None:
    text = submission(spec)
    assert "metaopt" not in "".join(line for line in text.splitlines() if "import" in line)
    made: dict[str, Any] = {}
    exec(compile(text, "submission.py", "exec"), made)
    model, workload, hyperparameters = network(), Workload(), SimpleNamespace(dropout_rate=0.1)
    ours = network()
    opt = metaopt.build(ours, spec, total_steps=HINT)
    state = made["init_optimizer_state"](workload, model, None, hyperparameters, 0)
    queue, own = batches(), batches()
    for step in range(HINT):
        batch = made["data_selection"](workload, queue, state, model, None, hyperparameters, step, 0)
        state, model, _ = made["update_params"](
            workload, model, None, None, hyperparameters, batch, None, state, [], step, 0
        )
        opt.zero_grad()
        batch = next(own)
        loss = nn.functional.cross_entropy(ours(batch["inputs"]), batch["targets"], reduction="sum") / 6
        loss.backward()
        opt.step()
        assert all(map(torch.equal, model.parameters(), ours.parameters())), step
        if step % 10 == 4:
            shown = made["prepare_for_eval"](workload, model, None, None, hyperparameters, None, state, [], step, 0)
            state, model, _ = shown
            with opt.averaged() if opt.averages else torch.no_grad():
                assert all(map(torch.equal, model.parameters(), ours.parameters())), step


def test_every_function_of_a_submission_takes_what_the_contest_gives() -> None:
    made: dict[str, Any] = {}
    exec(submission("sgd(lr=0.1)"), made)
    assert made["get_batch_size"]("wmt") == 128
    with pytest.raises(ValueError, match="Unsupported workload"):
        made["get_batch_size"]("nothing")
    names = {"init_optimizer_state", "update_params", "prepare_for_eval", "get_batch_size", "data_selection"}
    assert names <= set(made)


def test_bases_with_different_averages_cannot_be_exported() -> None:
    with pytest.raises(SpecError, match="keep different averages, lookahead and ema: keep one, behind the partition"):
        submission("partition({'matrix': sgd(lr=0.1) | lookahead, '*': sgd(lr=0.1) | ema})")


def test_the_head_of_a_submission_says_how_to_call_it() -> None:
    for spec in ("sgd(lr=0.1)", "partition({'matrix': sgd(lr=0.1), '*': sgd(lr=0.2)})"):
        assert "Call `make_optimizer(params, total_steps)` with" in submission(spec)


def test_what_cannot_be_ejected_cannot_be_exported() -> None:
    with pytest.raises(SpecError, match="evaluates the loss itself"):
        submission("sam | sgd(lr=0.1)")


def test_the_command_writes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", "adamw(lr=cosine(1e-3))", "--form", "algoperf", "--out", str(tmp_path / "submission.py")])
    assert not ended.value.code
    assert "def update_params(" in (tmp_path / "submission.py").read_text()
