"""Run in a new process: load the stack saved at every step and continue; print the final weights of each, exactly."""

import json
import sys

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


if __name__ == "__main__":
    saved = torch.load(sys.argv[1], weights_only=True)
    results = []
    for step, checkpoint in saved["checkpoints"].items():
        model, opt = make(saved["spec"])
        model.load_state_dict(checkpoint["model"])
        opt.load_state_dict(checkpoint["opt"])
        train(model, opt, step, STEPS)
        results.append(weights(model))
    print(json.dumps(results))
