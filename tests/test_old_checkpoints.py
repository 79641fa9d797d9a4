"""A checkpoint that an earlier commit's code wrote loads and continues bit for bit.

`data/write_checkpoints.py` says how the files were written. Adding a run there adds a name to NAMES here.
"""

import copy
import functools
import warnings
from typing import Any

import checkpoint_runs as runs
import pytest
import torch

pytestmark = pytest.mark.slow

# written out: a file that is missing makes a test fail, it does not make one vanish
NAMES = (
    "adamw",
    "adamw-float32",
    "adamw-amsgrad",
    "sgd",
    "sgd-momentum",
    "adagrad",
    "rmsprop",
    "lbfgs",
    "muon",
    "adamw-lookahead",
    "adamw-lookahead-float32",
    "sgd-lookahead",
    "sgd-momentum-lookahead",
    "adagrad-lookahead",
    "rmsprop-lookahead",
    "lbfgs-lookahead",
    "muon-lookahead",
    "adam-lookahead",
    "nadam-lookahead",
    "radam-lookahead",
    "adamax-lookahead",
    "adadelta-lookahead",
    "adafactor-lookahead",
    "asgd-lookahead",
    "rprop-lookahead",
    "lookahead-pullback",
    "lookahead-pullback-sgd",
    "lookahead-reset-at-the-pull",
    "lookahead-reset-after-the-pull",
    "lookahead-reset-before-the-pull",
    "lookahead-reset-adagrad",
    "lookahead-reset-sgd",
    "lookahead-reset-uneven",
    "lookahead-slow-dtype",
    "lookahead-slow-dtype-pullback",
    "lookahead-nested",
    "outer",
    "outer-plain-momentum",
    "outer-slow-dtype",
    "ema",
    "ema-warmup",
    "ema-average-dtype",
    "cautious",
    "cautious-lookahead",
    "cautious-uneven",
    "sam",
    "sam-adaptive-lookahead",
    "decay",
    "l2",
    "clip-grad-norm",
    "clip-grad-value",
    "adaptive-grad-clip",
    "centralize",
    "accumulate-first-window",
    "accumulate-first-window-lookahead",
    "accumulate-first-window-uneven",
    "accumulate-first-window-cautious",
    "accumulate-later-window",
    "accumulate-between-windows",
    "accumulate-later-window-uneven",
    "skip-nonfinite",
    "skip-nonfinite-accumulate",
    "partition",
    "partition-uneven",
    "partition-accumulate",
    "partition-first-window",
    "partition-muon",
    "groups",
    "groups-scheduled",
    "groups-decay",
    "warmup-cosine",
    "wsd",
    "one-cycle",
    "scheduled-wrappers",
    "scheduled-accumulate",
    "averaged-lookahead",
    "averaged-ema",
    "averaged-ema-dtype",
    "averaged-uneven",
    "averaged-partition",
    "reset-moments",
    "reset-moments-ema",
    "reset-moments-bare",
    "reset-moments-uneven",
    "template",
    "template-sgd",
    "template-adagrad",
    "template-scheduled",
    "template-accumulate",
    "template-partition",
    "before-the-first-step",
    "uneven-adamw",
    "uneven-adagrad",
    "uneven-sgd",
    "wrapped",
    "other-constants",
    "bare-adamw",
    "bare-sgd",
    "bare-sgd-without-state",
    "one-wrapper-less",
    "one-wrapper-more",
)
# another processor or another torch may round otherwise: what is asked for then, relative and absolute
CLOSE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}
# its product of matrices is in bfloat16 whatever the dtype of the weights
CLOSE_OF_MUON = 1e-2


def test_every_checkpoint_that_was_written_is_continued_here() -> None:
    assert {file.stem for file in runs.FOLDER.glob("*")} == {*NAMES, "references"}


@functools.cache
def reproduced() -> frozenset[str]:
    """Return the reference runs, of torch without metaopt, that come out here as they did where the files were written.

    Vector widths and libraries differ between processors, and with them the order of sums and the last digits of some
    functions. A run whose references come out bit for bit must do so too; otherwise no one can ask for more than CLOSE.
    """
    written, here = runs.load("references"), runs.references()
    assert written.keys() == here.keys()
    return frozenset(name for name, values in written.items() if torch.equal(values, here[name]))


def first_difference(saved: dict[str, Any], model: torch.nn.ParameterDict, opt: Any) -> str | None:
    """Make the steps after a checkpoint; return where they first differ from those that were written."""
    run = saved["run"]
    exact = reproduced().issuperset(run["relies_on"])
    near = CLOSE_OF_MUON if "Muon" in run["relies_on"] else CLOSE[run["dtype"]]

    def agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
        if exact or found.dtype != expected.dtype:
            return found.dtype == expected.dtype and torch.equal(found, expected)
        return torch.allclose(found, expected, rtol=near, atol=near)

    for i, found in enumerate(runs.continued(run, model, opt, list(saved["averages"]))):
        where = f"{i + 1} steps after the checkpoint"
        if found["updates"] != saved["updates"][i]:
            return f"{where}: {found['updates']} updates, not {saved['updates'][i]}"
        if not agree(found["weights"], saved["continued"][i]):
            return f"{where}: the weights are off by {found['weights'] - saved['continued'][i]}"
        for label, rows in saved["averages"].items():
            if not agree(found["averages"][label], rows[i]):
                return f"{where}: the average of {label} is off by {found['averages'][label] - rows[i]}"
    return None


def loaded(saved: dict[str, Any], *, model_first: bool = True) -> tuple[torch.nn.ParameterDict, Any]:
    """Return the model and the stack of a checkpoint, built anew with other weights and then loaded."""
    run = saved["run"]
    model = runs.model_of(run, phase=11)
    opt = runs.optimizer_of(run, model, run["continues_as"])
    state = copy.deepcopy(saved["optimizer"])
    if model_first:
        model.load_state_dict(saved["weights"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.load_state_dict(state)
    if not model_first:
        model.load_state_dict(saved["weights"])
    assert len(caught) == bool(run["warning"] or opt.load_report.differences), [str(each.message) for each in caught]
    assert all((run["warning"] or "from the checkpoint: ") in str(each.message) for each in caught)
    if "metaopt.updates" not in state["param_groups"][0]:
        opt.updates = 0  # the code that wrote the files did not read the count from a bare optimizer's state
    return model, opt


@pytest.mark.parametrize("model_first", [True, False], ids=["model first", "optimizer first"])
@pytest.mark.parametrize("name", NAMES)
def test_an_old_checkpoint_continues_bit_for_bit(name: str, model_first: bool) -> None:
    saved = runs.load(name)
    assert len(saved["continued"]) == len(saved["updates"]) == runs.CONTINUED
    assert saved["updates"][-1] > 0
    assert first_difference(saved, *loaded(saved, model_first=model_first)) is None


@pytest.mark.parametrize("name", NAMES)
def test_what_was_loaded_and_saved_again_continues_in_the_same_way(name: str) -> None:
    saved = runs.load(name)
    model, opt = loaded(saved)
    again = {**saved, "weights": dict(model.state_dict()), "optimizer": opt.state_dict()}
    again["run"] = {**saved["run"], "warning": None}
    assert first_difference(saved, *loaded(copy.deepcopy(again))) is None


@pytest.mark.parametrize("name", ["adamw-lookahead", "ema-warmup", "accumulate-first-window", "lbfgs"])
def test_a_checkpoint_with_another_number_in_it_does_not_continue_so(name: str) -> None:
    saved = runs.load(name)
    first = saved["optimizer"]["state"][0]
    keys = {
        "adamw-lookahead": "lookahead.slow",
        "ema-warmup": "ema.average",
        "accumulate-first-window": "accumulate.sum",
    }
    changed = first[keys[name]] if name in keys else first["prev_flat_grad"]
    changed.mul_(1.0 + 1e-3)
    assert first_difference(saved, *loaded(saved)) is not None
