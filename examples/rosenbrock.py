"""Four optimizers on the Rosenbrock function, with their trajectories drawn over its contours."""

import sys
from pathlib import Path

import torch

import metaopt

STACKS = {
    "SGD": "sgd(lr=1e-3)",
    "momentum": "sgd(lr=1e-3, momentum=0.9)",
    "RMSprop": "rmsprop(lr=1e-2, alpha=0.9)",
    "Adam": "adam(lr=1e-2)",
}


def rosenbrock(x, y):
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def trajectory(spec, steps=500):
    """Return the positions from (-0.5, 0.5) on, in float64: (steps + 1, 2)."""
    position = torch.nn.Parameter(torch.tensor([-0.5, 0.5], dtype=torch.float64))
    opt = metaopt.build([position], spec)
    path = [position.detach().clone()]
    for _ in range(steps):
        opt.zero_grad()
        rosenbrock(*position).backward()
        opt.step()
        path.append(position.detach().clone())
    return torch.stack(path)


def draw(paths, file):
    import matplotlib

    matplotlib.use("Agg")  # a file, no window
    import matplotlib.pyplot as plt

    x, y = torch.meshgrid(torch.linspace(-1.5, 1.5, 200), torch.linspace(-0.5, 1.5, 200), indexing="xy")
    figure, axes = plt.subplots(figsize=(7, 5))
    axes.contour(x, y, rosenbrock(x, y), levels=torch.logspace(-1, 3, 12).tolist(), colors="0.8", linewidths=0.8)
    for name, path in paths.items():
        axes.plot(*path.T, label=name, linewidth=1.2)
    axes.plot(1, 1, "k*", label="minimum")
    axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    file = Path(sys.argv[1] if len(sys.argv) > 1 else "rosenbrock.png")
    paths = {name: trajectory(spec) for name, spec in STACKS.items()}
    for name, path in paths.items():
        x, y = path[-1].tolist()
        print(f"{name:10} ends at ({x:.6f}, {y:.6f})")
    draw(paths, file)
    print(f"trajectories: {file}")
