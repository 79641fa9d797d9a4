"""Problems on a few numbers: Rosenbrock's valley and the noisy quadratic of the Lookahead paper."""

from collections.abc import Iterator

import torch

from metaopt import Problem, hookimpl, hyper


class Point(torch.nn.Module):
    """A model that is one vector of parameters."""

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(start)


class Rosenbrock(Problem):
    """(1 - x)^2 + 100 (y - x^2)^2 from (-0.5, 0.5), in float64; 0 at (1, 1). doi:10.1093/comjnl/3.3.175

    Seed 0 starts there; other seeds start N(0, 0.01^2) beside it.
    """

    targets = {"loss": 1e-2}

    def model(self, seed: int, device: torch.device | str = "cpu") -> torch.nn.Module:
        # the seed moves the start a little, and seed 0 not at all: seeds would otherwise all be one run
        shift = 0.01 * torch.randn(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * (seed != 0)
        return Point(torch.tensor([-0.5, 0.5], dtype=torch.float64) + shift).to(device)

    def batches(self, seed: int, device: torch.device | str = "cpu", start: int = 0) -> Iterator[None]:
        while True:
            yield None

    def loss(self, model: torch.nn.Module, batch: None) -> torch.Tensor:
        x, y = next(model.parameters()).unbind()
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2

    @torch.no_grad()
    def evaluate(self, model: torch.nn.Module, split: str = "validation") -> dict[str, float]:
        return {"loss": float(self.loss(model, None))}

    def data_hash(self) -> str:
        return "rosenbrock"


class NoisyQuadratic(Problem):
    """sum_i a_i (x_i - c_i)^2 / 2 with a_i = 1 / i and c ~ N(0, sigma^2 a^-1) anew for every batch. arXiv:1907.08610"""

    targets = {"loss": 1.0}
    dimensions: int = hyper(100, ge=1, doc="number of eigenvalues, 1 / i each")
    sigma: float = hyper(1.0, ge=0.0, doc="size of the gradient noise")

    def _eigenvalues(self, device: torch.device | str) -> torch.Tensor:
        return 1.0 / torch.arange(1, self.dimensions + 1, dtype=torch.float64, device=device)

    def model(self, seed: int, device: torch.device | str = "cpu") -> torch.nn.Module:
        start = torch.randn(self.dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return Point(start).to(device)

    def batches(self, seed: int, device: torch.device | str = "cpu", start: int = 0) -> Iterator[torch.Tensor]:
        number = start
        while True:
            generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + number)
            noise = torch.randn(self.dimensions, generator=generator, dtype=torch.float64).to(device)
            yield self.sigma * noise / self._eigenvalues(device).sqrt()
            number += 1

    def loss(self, model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        x = next(model.parameters())
        return 0.5 * (self._eigenvalues(x.device) * (x - batch) ** 2).sum()

    @torch.no_grad()
    def evaluate(self, model: torch.nn.Module, split: str = "validation") -> dict[str, float]:
        x = next(model.parameters())
        # the expected loss less the part that no weights can lower
        return {"loss": float(0.5 * (self._eigenvalues(x.device) * x**2).sum())}

    def data_hash(self) -> str:
        return f"noisy_quadratic {self.dimensions} {self.sigma}"


@hookimpl
def metaopt_problems() -> dict[str, type[Problem]]:
    return {"rosenbrock": Rosenbrock, "noisy_quadratic": NoisyQuadratic}
