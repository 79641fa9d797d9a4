"""Write the checkpoints that `test_old_checkpoints.py` continues: those of the code at commit b2a2e8e.

Run it with that commit's code, so that what it writes is older than the code that loads it:

    git worktree add ../before b2a2e8e
    PYTHONPATH=../before python tests/data/write_checkpoints.py

It writes `checkpoints/<name>.pt` for each run below, and `checkpoints/references.pt`. A file holds the description of
its run, the model's weights and the optimizer's state dict at the checkpoint, and for each step of the uninterrupted
run after it the weights, the averages that `averaged()` shows and the number of updates.
"""

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import checkpoint_runs as runs
from checkpoint_runs import described

AVERAGED, RESET, TEMPLATE = "inside averaged", "after reset_state('moments')", "with template state"
LATE = {"vector": [0, 1, 2, 3, 4, 5, 6], "scalar": [2, 3, 4, 6, 7]}
MATRIX = {"members": ["matrix"]}
BFLOAT = {"dtype": "bfloat16"}
TWO_GROUPS = [
    {"params": ["matrix"], "name": "first", "lr_scale": 0.5, "lookahead.k": 3, "lookahead.alpha": 0.8},
    {"params": ["vector", "scalar"], "name": "second", "lr_scale": 2.0},
]
DECAYED_GROUPS = [{"params": ["matrix"], "weight_decay": 0.3, "ema.decay": 0.5}, {"params": ["vector", "scalar"]}]
PARTS = "partition({'matrix': sgd(lr=0.1, momentum=0.9) | lookahead(k=2), '*': adamw(lr=0.05) | ema(0.8)})"

RUNS: dict[str, dict[str, Any]] = {
    # bases, without and with a wrapper that keeps state beside theirs
    "adamw": described(spec="adamw(lr=0.05)"),
    "adamw-float32": described(spec="adamw(lr=0.05)", dtype="float32"),
    "adamw-amsgrad": described(spec="adamw(lr=0.05, amsgrad=True) | lookahead(k=3)"),
    "sgd": described(spec="sgd(lr=0.1)"),
    "sgd-momentum": described(spec="sgd(lr=0.1, momentum=0.9, nesterov=True)"),
    "adagrad": described(spec="adagrad(lr=0.2, initial_accumulator_value=0.1)"),
    "rmsprop": described(spec="rmsprop(lr=0.02, momentum=0.5, centered=True)"),
    "lbfgs": described(spec="lbfgs(lr=0.25, max_iter=3)", closure=True),
    "muon": described(spec="muon(lr=0.05)", **MATRIX),
    "adamw-lookahead": described(spec="adamw(lr=0.05) | lookahead(k=3)"),
    "adamw-lookahead-float32": described(spec="adamw(lr=0.05) | lookahead(k=3)", dtype="float32"),
    "sgd-lookahead": described(spec="sgd(lr=0.1) | lookahead(k=3)"),
    "sgd-momentum-lookahead": described(spec="sgd(lr=0.1, momentum=0.9) | lookahead(k=3)"),
    "adagrad-lookahead": described(spec="adagrad(lr=0.2) | lookahead(k=3)"),
    "rmsprop-lookahead": described(spec="rmsprop(lr=0.02) | lookahead(k=3)"),
    "lbfgs-lookahead": described(spec="lbfgs(lr=0.25, max_iter=3) | lookahead(k=2)", closure=True),
    "muon-lookahead": described(spec="muon(lr=0.05) | lookahead(k=3)", **MATRIX),
    "adam-lookahead": described(spec="adam(lr=0.05) | lookahead(k=3)"),
    "nadam-lookahead": described(spec="nadam(lr=0.05) | lookahead(k=3)"),
    "radam-lookahead": described(spec="radam(lr=0.05) | lookahead(k=3)"),
    "adamax-lookahead": described(spec="adamax(lr=0.05) | lookahead(k=3)"),
    "adadelta-lookahead": described(spec="adadelta(lr=1.0) | lookahead(k=3)"),
    "adafactor-lookahead": described(spec="adafactor(lr=0.05) | lookahead(k=3)"),
    "asgd-lookahead": described(spec="asgd(lr=0.1) | lookahead(k=3)"),
    "rprop-lookahead": described(spec="rprop(lr=0.05) | lookahead(k=3)"),
    # lookahead and outer
    "lookahead-pullback": described(spec="adamw(lr=0.05) | lookahead(k=3, pullback_momentum='pullback')"),
    "lookahead-pullback-sgd": described(
        spec="sgd(lr=0.1, momentum=0.9) | lookahead(k=2, alpha=0.7, pullback_momentum='pullback')"
    ),
    "lookahead-reset-at-the-pull": described(
        spec="adamw(lr=0.05) | lookahead(k=3, pullback_momentum='reset')", before=3
    ),
    "lookahead-reset-after-the-pull": described(
        spec="adamw(lr=0.05) | lookahead(k=3, pullback_momentum='reset')", before=4
    ),
    "lookahead-reset-before-the-pull": described(
        spec="adamw(lr=0.05) | lookahead(k=3, pullback_momentum='reset')", before=5
    ),
    "lookahead-reset-adagrad": described(
        spec="adagrad(lr=0.2, initial_accumulator_value=0.1) | lookahead(k=2, pullback_momentum='reset')", before=4
    ),
    "lookahead-reset-sgd": described(
        spec="sgd(lr=0.1, momentum=0.9) | lookahead(k=2, pullback_momentum='reset')", before=4
    ),
    "lookahead-reset-uneven": described(
        spec="adamw(lr=0.05) | lookahead(k=2, pullback_momentum='reset')", before=4, absent=LATE
    ),
    "lookahead-slow-dtype": described(spec="adamw(lr=0.05) | lookahead(k=3, slow_dtype='float32')", **BFLOAT),
    "lookahead-slow-dtype-pullback": described(
        spec="sgd(lr=0.1, momentum=0.9) | lookahead(k=2, slow_dtype='float32', pullback_momentum='pullback')", **BFLOAT
    ),
    "lookahead-nested": described(
        spec="sgd(lr=0.1, momentum=0.9) | lookahead(k=2) | lookahead(k=6, alpha=0.8, label='far')"
    ),
    "outer": described(spec="adamw(lr=0.05) | outer(k=3)"),
    "outer-plain-momentum": described(spec="sgd(lr=0.1) | outer(k=2, nesterov=False, momentum=0.5)", before=4),
    "outer-slow-dtype": described(spec="adamw(lr=0.05) | outer(k=2, slow_dtype='float32')", **BFLOAT),
    # the other wrappers
    "ema": described(spec="adamw(lr=0.05) | ema(0.9)"),
    "ema-warmup": described(spec="sgd(lr=0.1) | ema(0.45, warmup=True)"),
    "ema-average-dtype": described(spec="adamw(lr=0.05) | ema(0.9, average_dtype='float32')", **BFLOAT),
    "cautious": described(spec="adamw(lr=0.05) | cautious"),
    "cautious-lookahead": described(spec="sgd(lr=0.1, momentum=0.9) | cautious | lookahead(k=3)"),
    "cautious-uneven": described(spec="adamw(lr=0.05) | cautious", absent=LATE),
    "sam": described(spec="sam(0.1) | sgd(lr=0.1, momentum=0.9)", closure=True),
    "sam-adaptive-lookahead": described(spec="sam(0.5, adaptive=True) | adamw(lr=0.05) | lookahead(k=3)", closure=True),
    "decay": described(spec="decay(0.1) | adam(lr=0.05)"),
    "l2": described(spec="l2(0.1) | adam(lr=0.05)"),
    "clip-grad-norm": described(spec="clip_grad_norm(0.5) | adamw(lr=0.05)"),
    "clip-grad-value": described(spec="clip_grad_value(0.25) | sgd(lr=0.1, momentum=0.9)"),
    "adaptive-grad-clip": described(spec="adaptive_grad_clip(0.2) | sgd(lr=0.1, momentum=0.9)"),
    "centralize": described(spec="centralize | adamw(lr=0.05)"),
    "accumulate-first-window": described(spec="accumulate(3) | adamw(lr=0.05)", before=2),
    "accumulate-first-window-lookahead": described(
        spec="accumulate(3) | adagrad(lr=0.2, initial_accumulator_value=0.1) | lookahead(k=2)", before=2
    ),
    "accumulate-first-window-uneven": described(
        spec="accumulate(3) | adamw(lr=0.05) | lookahead(k=2)",
        before=2,
        absent={"vector": [0, 2, 4], "scalar": [0, 1, 3]},
    ),
    "accumulate-first-window-cautious": described(
        spec="accumulate(2) | sgd(lr=0.1, momentum=0.9) | cautious", before=1
    ),
    "accumulate-later-window": described(spec="accumulate(3) | adamw(lr=0.05) | lookahead(k=2)", before=5),
    "accumulate-between-windows": described(spec="accumulate(3) | adamw(lr=0.05)", before=6),
    "accumulate-later-window-uneven": described(
        spec="accumulate(3) | sgd(lr=0.1, momentum=0.9)", before=5, absent={"vector": [0, 1, 2, 3, 6], "scalar": [4, 5]}
    ),
    "skip-nonfinite": described(spec="skip_nonfinite(3) | adamw(lr=0.05) | lookahead(k=3)", nonfinite=[1, 4, 5]),
    "skip-nonfinite-accumulate": described(
        spec="skip_nonfinite(3) | accumulate(2) | adamw(lr=0.05)", nonfinite=[3, 4, 6], before=4
    ),
    # parts and groups
    "partition": described(spec=f"clip_grad_norm(1.0) | {PARTS} | lookahead(k=3, label='around')"),
    "partition-uneven": described(spec=f"clip_grad_norm(1.0) | {PARTS} | lookahead(k=3, label='around')", absent=LATE),
    "partition-accumulate": described(spec=f"accumulate(2) | {PARTS} | ema(0.7, label='around')", before=3),
    "partition-first-window": described(spec=f"accumulate(2) | {PARTS}", before=1),
    "partition-muon": described(spec="partition({'matrix': muon(lr=0.05), '*': adagrad(lr=0.2)}) | lookahead(k=3)"),
    "groups": described(spec="adamw(lr=0.05) | lookahead(k=2)", groups=TWO_GROUPS),
    "groups-scheduled": described(
        spec="sgd(lr=warmup(cosine(0.2), 3), momentum=0.9) | lookahead(k=2)", groups=TWO_GROUPS, total_steps=12
    ),
    "groups-decay": described(spec="adamw(lr=0.05, weight_decay=0.1) | ema(0.9)", groups=DECAYED_GROUPS),
    # schedules
    "warmup-cosine": described(spec="adamw(lr=warmup(cosine(0.1), 4)) | lookahead(k=3)", total_steps=12, before=3),
    "wsd": described(spec="sgd(lr=wsd(0.2, warmup=2, decay=0.4), momentum=0.9)", total_steps=12),
    "one-cycle": described(spec="adamw(lr=one_cycle(0.1))", total_steps=12),
    "scheduled-wrappers": described(
        spec="clip_grad_norm(1.0) | adamw(lr=0.05, weight_decay=linear(0.1, 0.3)) | "
        "lookahead(k=2, alpha=warmup(constant(0.5), 4, start=0.1)) | ema(linear(0.5, 0.9, steps=10))",
        total_steps=12,
    ),
    "scheduled-accumulate": described(
        spec="accumulate(2) | sgd(lr=cosine_restarts(0.2, 3), momentum=0.9) | outer(k=2)", before=7
    ),
    # moments of a run at which more is under way
    "averaged-lookahead": described(spec="adamw(lr=0.05) | lookahead(k=3)", saved=AVERAGED),
    "averaged-ema": described(spec="sgd(lr=0.1, momentum=0.9) | ema(0.8)", saved=AVERAGED),
    "averaged-ema-dtype": described(
        spec="adamw(lr=0.05) | ema(0.8, average_dtype='float32')", saved=AVERAGED, **BFLOAT
    ),
    "averaged-uneven": described(spec="adamw(lr=0.05) | outer(k=2)", saved=AVERAGED, absent=LATE),
    "averaged-partition": described(spec=PARTS, saved=AVERAGED),
    "reset-moments": described(spec="adamw(lr=0.05) | lookahead(k=3)", saved=RESET),
    "reset-moments-ema": described(spec="sgd(lr=0.1, momentum=0.9) | ema(0.8)", saved=RESET),
    "reset-moments-bare": described(spec="adamw(lr=0.05)", saved=RESET),
    "reset-moments-uneven": described(
        spec="adagrad(lr=0.2, initial_accumulator_value=0.1) | lookahead(k=3)",
        saved=RESET,
        absent={"vector": [5, 6, 7], "scalar": [6]},
    ),
    "template": described(spec="adamw(lr=0.05) | lookahead(k=3)", saved=TEMPLATE, before=0),
    "template-sgd": described(spec="sgd(lr=0.1, momentum=0.9) | outer(k=2)", saved=TEMPLATE, before=0),
    "template-adagrad": described(
        spec="adagrad(lr=0.2, initial_accumulator_value=0.1) | lookahead(k=2, pullback_momentum='pullback')",
        saved=TEMPLATE,
        before=0,
        absent=LATE,
    ),
    "template-scheduled": described(
        spec="nadam(lr=warmup(cosine(0.1), 3)) | ema(0.8)", saved=TEMPLATE, before=0, total_steps=12
    ),
    "template-accumulate": described(
        spec="accumulate(2) | adamw(lr=0.05) | cautious", saved=TEMPLATE, before=0, absent=LATE
    ),
    "template-partition": described(spec=f"{PARTS} | lookahead(k=3, label='around')", saved=TEMPLATE, before=0),
    "before-the-first-step": described(spec="adagrad(lr=0.2) | lookahead(k=2)", before=0),
    # gradients that come late
    "uneven-adamw": described(spec="adamw(lr=0.05) | lookahead(k=3)", absent=LATE),
    "uneven-adagrad": described(
        spec="adagrad(lr=0.2, initial_accumulator_value=0.1) | outer(k=2) | ema(0.8)", absent=LATE
    ),
    "uneven-sgd": described(
        spec="sgd(lr=0.1, momentum=0.9) | lookahead(k=2, pullback_momentum='pullback')", absent=LATE
    ),
    # from one optimizer into another
    "wrapped": described(
        spec="clip_grad_norm(1.0) | lookahead(k=3)", wrapped=["AdamW", {"lr": 0.05, "weight_decay": 0.1}]
    ),
    "other-constants": described(
        spec="adamw(lr=0.05, betas=(0.8, 0.9)) | lookahead(k=3, alpha=0.7)",
        continues_as="adamw(lr=0.5) | lookahead(k=2)",
    ),
    "bare-adamw": described(
        spec="", bare=["AdamW", {"lr": 0.05}], continues_as="adamw(lr=0.5) | lookahead(k=3)", warning="fresh: lookahead"
    ),
    "bare-sgd": described(
        spec="",
        bare=["SGD", {"lr": 0.1, "momentum": 0.9}],
        continues_as="sgd(lr=0.5, momentum=0.9) | lookahead(k=2, pullback_momentum='pullback')",
        warning="fresh: lookahead",
    ),
    "bare-sgd-without-state": described(
        spec="", bare=["SGD", {"lr": 0.1}], continues_as="sgd(lr=0.5) | ema(0.8)", warning="fresh: ema"
    ),
    "one-wrapper-less": described(
        spec="clip_grad_norm(1.0) | adamw(lr=0.05) | lookahead(k=3) | ema(0.8)",
        continues_as="clip_grad_norm(1.0) | adamw(lr=0.05) | lookahead(k=3)",
        warning="dropped: ema",
    ),
    "one-wrapper-more": described(
        spec="adamw(lr=0.05) | lookahead(k=3)",
        continues_as="accumulate(2) | adamw(lr=0.05) | lookahead(k=3) | ema(0.8)",
        warning="fresh: accumulate, ema",
    ),
}


def checkpoint_of(run: dict[str, Any]) -> dict[str, Any]:
    """Return what the file of a run holds."""
    model = runs.model_of(run)
    opt = runs.optimizer_of(run, model)
    for step in range(run["before"]):
        runs.make_step(run, model, opt, step)
    if run["saved"] == RESET:
        opt.reset_state("moments")
    if run["saved"] == TEMPLATE:
        make_template_step(model, opt)
    with runs.saved_inside(opt, averages_of(opt), averaged=run["saved"] == AVERAGED):
        at_checkpoint = copy.deepcopy({"weights": dict(model.state_dict()), "optimizer": opt.state_dict()})
    if run["continues_as"] is not None:
        opt = runs.optimizer_of(run, model, run["continues_as"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if run["warning"] else "error", UserWarning)
            opt.load_state_dict(copy.deepcopy(at_checkpoint["optimizer"]))
    labels = averages_of(opt)
    after = list(runs.continued(run, model, opt, labels))
    return {
        "run": {**run, "relies_on": relied_on(run, opt)},
        **at_checkpoint,
        # a row a step
        "continued": torch.stack([each["weights"] for each in after]),
        "averages": {label: torch.stack([each["averages"][label] for each in after]) for label in labels},
        "updates": [each["updates"] for each in after],
    }


def make_template_step(model: torch.nn.ParameterDict, opt: torch.optim.Optimizer) -> None:
    """Have the state made as torch.distributed.checkpoint has it made: by a step at a rate of 0 with gradients of 0."""
    rates = [group["lr"] for group in opt.param_groups]
    for p in model.values():
        p.grad = torch.zeros_like(p)
    for group in opt.param_groups:
        group["lr"] = 0.0
    opt.step(closure=None)
    for group, rate in zip(opt.param_groups, rates, strict=True):
        group["lr"] = rate
    opt.zero_grad(set_to_none=True)


def averages_of(opt: Any) -> list[str]:
    """Return the labels under which a stack shows averages."""
    wrappers = [wrapper for lane in getattr(opt, "lanes", ()) for wrapper in lane.chain]
    return list(dict.fromkeys(wrapper.label for wrapper in wrappers if "averaged" in wrapper.acts_on()))


def relied_on(run: dict[str, Any], opt: Any) -> list[str]:
    """Return the references that must come out bit for bit where the run is to."""
    return [f"arithmetic {run['dtype']}", *dict.fromkeys(type(lane.base).__name__ for lane in opt.lanes)]


def main() -> None:
    """Write every file anew."""
    runs.FOLDER.mkdir(exist_ok=True)
    for old in runs.FOLDER.glob("*.pt"):
        old.unlink()
    save("references", runs.references())
    for name, run in RUNS.items():
        save(name, checkpoint_of(run))
    print("\n".join(RUNS))


def save(name: str, value: Any) -> None:
    """Write one file in torch's older format: the newer one takes twice the space for tensors as small as these."""
    torch.save(value, runs.FOLDER / f"{name}.pt", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
