"""An outer optimizer: every ten updates of Adam are one step of Nesterov momentum on the way they went."""

import torch

import metaopt


def rosenbrock(x, y):
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


for spec in (
    "adam(lr=1e-2)",
    "adam(lr=1e-2) | lookahead(k=10, alpha=0.7)",
    "adam(lr=1e-2) | outer(k=10, lr=0.7, momentum=0.0)",  # the same
    "adam(lr=1e-2) | outer(k=10, lr=0.7, momentum=0.9)",
):
    position = torch.nn.Parameter(torch.tensor([-0.5, 0.5], dtype=torch.float64))
    opt = metaopt.build([position], spec)
    for _ in range(500):
        opt.zero_grad()
        rosenbrock(*position).backward()
        opt.step()
    x, y = position.tolist()
    print(f"{spec:50} ends at ({x:.6f}, {y:.6f}), {rosenbrock(x, y):.6f} above the minimum")
