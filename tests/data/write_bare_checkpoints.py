"""Write `bare/*.pt`: what other versions of torch save of a bare optimizer, without metaopt.

Run it with each version: `python tests/data/write_bare_checkpoints.py` in an environment that has only that torch and
numpy. A file holds the weights and the optimizer's state dict after STEPS updates, and the weights of later updates.
"""

from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "bare"
STEPS, AFTER = 30, 5
KINDS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "SGD": {"lr": 0.05, "momentum": 0.9},
}


def model() -> torch.nn.Sequential:
    """Return a small network whose weights are fixed numbers."""
    layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    with torch.no_grad():
        for position, p in enumerate(layers.parameters()):
            p.copy_(torch.sin(torch.arange(p.numel(), dtype=p.dtype) + position).reshape(p.shape))
    return layers


def update(network: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Make the update with this number."""
    data = torch.cos(torch.arange(24, dtype=torch.float64) * (step + 1)).reshape(8, 3)
    optimizer.zero_grad()
    (network(data) - 1.0).square().mean().backward()
    optimizer.step()


def main() -> None:
    """Write the file of each kind."""
    FOLDER.mkdir(exist_ok=True)
    version = torch.__version__.partition("+")[0]
    for kind, arguments in KINDS.items():
        network = model()
        optimizer = getattr(torch.optim, kind)(network.parameters(), **arguments)
        for step in range(STEPS):
            update(network, optimizer, step)
        saved = {
            "torch": version,
            "kind": kind,
            "arguments": arguments,
            "model": {name: p.clone() for name, p in network.state_dict().items()},
        }
        torch.save({**saved, "optimizer": optimizer.state_dict()}, FOLDER / "scratch")  # the state changes in place
        saved = torch.load(FOLDER / "scratch", weights_only=True)
        (FOLDER / "scratch").unlink()
        continued = []
        for step in range(STEPS, STEPS + AFTER):
            update(network, optimizer, step)
            continued.append({name: p.clone() for name, p in network.state_dict().items()})
        torch.save({**saved, "continued": continued}, FOLDER / f"{kind.lower()}-torch-{version}.pt")


if __name__ == "__main__":
    main()
