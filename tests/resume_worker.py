"""A run saved at every step, and what another process makes of it: the final weights from each, exactly."""

import copy
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

import metaopt

STEPS = 20


def make(spec: str) -> tuple[torch.nn.Module, metaopt.Stack]:
    """Return a small model with matrices alone (Muon takes nothing else) or with biases, and its stack."""
    torch.manual_seed(0)
    bias = "muon" not in spec
    model = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=bias), torch.nn.Tanh(), torch.nn.Linear(4, 2, bias=bias))
    return model, metaopt.build(model, spec, total_steps=STEPS)


def train(model: torch.nn.Module, opt: metaopt.Stack, first: int, last: int) -> None:
    """Make updates `first` to `last - 1`; the data of an update depend on its number alone."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        data, goal = torch.randn(8, 3, generator=generator), torch.randn(8, 2, generator=generator)

        def closure(data: torch.Tensor = data, goal: torch.Tensor = goal) -> torch.Tensor:
            opt.zero_grad()
            loss = torch.nn.functional.mse_loss(model(data), goal)
            loss.backward()
            return loss

        if "sparse_adam" in str(opt.spec):
            closure()
            for p in model.parameters():
                p.grad = p.grad.to_sparse()
            opt.step()
        else:
            opt.step(closure)


def weights(model: torch.nn.Module) -> list[str]:
    """Return the weights as hexadecimal floats: equal text means equal bits."""
    return [float(x).hex() for p in model.parameters() for x in p.detach().flatten()]


def save_at_every_step(
    spec: str, path: Path, inside: Callable[[metaopt.Stack], AbstractContextManager[None]] = lambda opt: nullcontext()
) -> list[str]:
    """Save checkpoints that are taken after every step, inside some context; return the final weights."""
    model, opt = make(spec)
    checkpoints = {}
    for step in range(STEPS):
        train(model, opt, step, step + 1)
        with inside(opt):
            checkpoints[step + 1] = copy.deepcopy({"model": model.state_dict(), "opt": opt.state_dict()})
    torch.save({"spec": spec, "checkpoints": checkpoints}, path)
    return weights(model)


def resume_from_every_step(path: Path | str) -> dict[int, list[str]]:
    """Load each of the checkpoints into a new stack and go on; return the final weights by step."""
    saved = torch.load(path, weights_only=True)
    found = {}
    for step, checkpoint in saved["checkpoints"].items():
        model, opt = make(saved["spec"])
        model.load_state_dict(checkpoint["model"])
        opt.load_state_dict(checkpoint["opt"])
        train(model, opt, step, STEPS)
        found[step] = weights(model)
    return found


if __name__ == "__main__":
    print(json.dumps(resume_from_every_step(sys.argv[1])))
