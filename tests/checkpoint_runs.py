"""Runs that a checkpoint file describes: how to build the model and the stack, and the gradients of every step.

`data/write_checkpoints.py` makes the files with it and `test_old_checkpoints.py` continues them. A description is plain
data. The gradients are a closed form of the step and the weights, in sums and products alone: those round in one way
on every processor.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import metaopt

FOLDER = Path(__file__).parent / "data" / "checkpoints"
SHAPES = {"matrix": (4, 3), "vector": (3,), "scalar": ()}
# how many steps a file holds after its checkpoint
CONTINUED = 7
# what a description holds if it says nothing else
DEFAULTS: dict[str, Any] = {
    "bare": None,  # a class of torch.optim and its arguments: the checkpoint is that optimizer's own
    "wrapped": None,  # a class of torch.optim and its arguments, given to metaopt.wrap
    "continues_as": None,  # the spec that loads the checkpoint, if it is another one
    "warning": None,  # what that load warns of
    "dtype": "float64",
    "members": ["matrix", "vector", "scalar"],
    "groups": None,  # one dict a group: its members and its own values
    "total_steps": None,
    "closure": False,
    "before": 5,  # steps before the checkpoint
    "saved": "after a step",  # or: "inside averaged", "after reset_state('moments')", "with template state"
    "absent": {},  # by member, the steps at which it has no gradient
    "nonfinite": [],  # the steps whose gradients are not finite
    "relies_on": [],  # the reference runs that must come out bit for bit before the weights can be expected to
}


def described(**given: Any) -> dict[str, Any]:
    """Return a whole description of a run. Raises KeyError for a key that none has."""
    unknown = given.keys() - DEFAULTS.keys() - {"spec"}
    if unknown:
        raise KeyError(f"no description has {', '.join(sorted(unknown))}")
    return {**DEFAULTS, **given}


def numbers(shape: tuple[int, ...], phase: int, dtype: torch.dtype) -> torch.Tensor:
    """Return eighths between -1 and 1, which every dtype holds exactly."""
    values = [((5 * i + 3 * phase) % 17 - 8) / 8 for i in range(math.prod(shape))]
    return torch.tensor(values, dtype=dtype).reshape(shape)


def model_of(run: dict[str, Any], phase: int = 0) -> torch.nn.ParameterDict:
    """Return the parameters of a run; another phase gives them other values."""
    dtype = getattr(torch, run["dtype"])
    return torch.nn.ParameterDict(
        {name: torch.nn.Parameter(numbers(SHAPES[name], phase, dtype)) for name in run["members"]}
    )


def optimizer_of(run: dict[str, Any], model: torch.nn.ParameterDict, spec: str | None = None) -> Any:
    """Return the stack of a run, or the bare optimizer whose checkpoint it is; a spec given makes a stack of that."""
    if spec is None and run["bare"] is not None:
        kind, arguments = run["bare"]
        return getattr(torch.optim, kind)(model.parameters(), **arguments)
    if run["wrapped"] is not None:
        kind, arguments = run["wrapped"]
        optimizer = getattr(torch.optim, kind)(model.parameters(), **arguments)
        return metaopt.wrap(optimizer, spec or run["spec"], total_steps=run["total_steps"])
    members: Any = list(model.items())
    if run["groups"] is not None:
        members = [{**group, "params": [(name, model[name]) for name in group["params"]]} for group in run["groups"]]
    return metaopt.build(members, spec or run["spec"], total_steps=run["total_steps"])


def fill_gradients(run: dict[str, Any], model: torch.nn.ParameterDict, step: int) -> torch.Tensor:
    """Leave the gradients of sum(w^4 / 16 + (w - target)^2 / 2) in the parameters; return that loss."""
    loss = torch.zeros((), dtype=torch.float64)
    for position, (name, p) in enumerate(model.items()):
        w = p.detach()
        away = w - numbers(tuple(p.shape), step + 7 * position, p.dtype)
        loss += ((w * w * w * w * 0.0625).double() + (away * away * 0.5).double()).sum()
        p.grad = None if step in run["absent"].get(name, ()) else w * w * w * 0.25 + away
        if step in run["nonfinite"] and p.grad is not None:
            p.grad.mul_(math.inf)
    return loss


def make_step(run: dict[str, Any], model: torch.nn.ParameterDict, opt: torch.optim.Optimizer, step: int) -> None:
    """Make one step as a training loop does."""
    opt.zero_grad()
    if not run["closure"]:
        fill_gradients(run, model, step)
        opt.step()
        return

    def evaluate() -> torch.Tensor:
        opt.zero_grad()
        return fill_gradients(run, model, step)

    opt.step(evaluate)


def continued(
    run: dict[str, Any], model: torch.nn.ParameterDict, opt: Any, labels: list[str]
) -> Iterator[dict[str, Any]]:
    """Make the steps after the checkpoint; yield after each the weights, the averages shown and the updates so far."""
    for step in range(run["before"], run["before"] + CONTINUED):
        make_step(run, model, opt, step)
        averages = {}
        for label in labels:
            with opt.averaged(label):
                averages[label] = weights(model)
        yield {"weights": weights(model), "averages": averages, "updates": opt.updates}


def weights(model: torch.nn.ParameterDict) -> torch.Tensor:
    """Return copies of all weights, one behind another."""
    return torch.cat([p.detach().reshape(-1) for p in model.values()])


def saved_inside(opt: Any, labels: list[str], *, averaged: bool) -> Any:
    """Return the context in which a checkpoint is taken."""
    return opt.averaged(labels[0]) if averaged else nullcontext()


def load(name: str) -> Any:
    """Return what a file of the folder holds; no code in it is run."""
    return torch.load(FOLDER / f"{name}.pt", weights_only=True)


# ---- what this processor and this torch make of the same numbers


def references() -> dict[str, torch.Tensor]:
    """Return what torch makes of fixed numbers, without metaopt: its arithmetic, and a short run of each base.

    Where all of it comes out as it did where the files were written, so do the weights of a stack.
    """
    return {
        **{f"arithmetic {dtype}": _arithmetic(getattr(torch, dtype)) for dtype in ("float64", "float32", "bfloat16")},
        **{kind: _run_of(kind) for kind in BASES},
    }


# LBFGS and Muon reduce and multiply in libraries that choose another order of sums on another processor
BASES: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 0.05},
    "Adam": {"lr": 0.05},
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adagrad": {"lr": 0.2},
    "RMSprop": {"lr": 0.02, "momentum": 0.5},
    "LBFGS": {"lr": 0.25, "max_iter": 3},
    "Muon": {"lr": 0.05},
    "NAdam": {"lr": 0.05},
    "RAdam": {"lr": 0.05},
    "Adamax": {"lr": 0.05},
    "Adadelta": {"lr": 1.0},
    "Adafactor": {"lr": 0.05},
    "ASGD": {"lr": 0.1},
    "Rprop": {"lr": 0.05},
}


def _arithmetic(dtype: torch.dtype) -> torch.Tensor:
    a, b, c = (numbers((4, 3), phase, dtype) / 3 for phase in (1, 2, 3))
    found = [
        a.lerp(b, 0.3),
        a.addcdiv(b, c.abs() + 0.1, value=-0.1),
        a.addcmul(b, c, value=0.7),
        a.abs().sqrt() / (b * b + 1.0),
        a.sub(b, alpha=0.3),
        *torch._foreach_lerp([a], [b], 0.3),
        *torch._foreach_add([a], [b], alpha=-0.7),
        torch.linalg.vector_norm(a),
        torch.linalg.vector_norm(a, dim=1),
        torch.stack(torch._foreach_norm([a, b, c])),
        a.mean(),
        a.mean(dim=1),
        a.sum(),
    ]
    return torch.cat([each.reshape(-1) for each in found])


def _run_of(kind: str) -> torch.Tensor:
    """Return the weights of five steps of a bare optimizer, in each dtype and by each of its kernels."""
    made = getattr(torch.optim, kind)
    members = ["matrix"] if kind == "Muon" else DEFAULTS["members"]
    found = []
    for dtype in ("float64", "float32"):
        run = described(spec="", dtype=dtype, members=members, closure=kind == "LBFGS")
        for fused in (False, True) if kind in ("AdamW", "Adam", "SGD", "Adagrad") else (False,):
            model = model_of(run)
            opt = made(model.parameters(), **BASES[kind], **({"fused": True} if fused else {}))
            for step in range(5):
                make_step(run, model, opt, step)
            found += [p.detach().double().reshape(-1) for p in model.values()]
    return torch.cat(found)
