"""Lookahead against the paper: numbers of its deterministic runs, and its rule on plain tensors (arXiv:1907.08610)."""

import pytest
import torch

import metaopt

START = (-0.5, 0.5)


def rosenbrock_gradient(x: torch.Tensor) -> torch.Tensor:
    a, b = x.tolist()
    return torch.tensor([-2 * (1 - a) - 400 * a * (b - a * a), 200 * (b - a * a)], dtype=torch.float64)


def final_position(spec: str, steps: int = 500) -> list[float]:
    x = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))
    opt = metaopt.build([x], spec)
    for _ in range(steps):
        x.grad = rosenbrock_gradient(x.detach())
        opt.step()
    return x.tolist()


@pytest.mark.parametrize(
    ("base", "momentum", "expected"),
    [
        ("sgd(lr=1e-3)", "none", (-0.21145085026218063, 0.049256778078894864)),
        ("sgd(lr=1e-3, momentum=0.9)", "none", (0.843882198797712, 0.7114556145003961)),
        ("sgd(lr=1e-3, momentum=0.9)", "reset", (0.3984824131290823, 0.15585185953689756)),
        ("sgd(lr=1e-3, momentum=0.9)", "pullback", (0.8507978001190653, 0.7232100989958057)),
        ("adam(lr=1e-2)", "none", (-0.11765688626358789, 0.016299238907475207)),
        ("adam(lr=1e-2)", "reset", (0.6004144659403283, 0.36715889786835354)),
    ],
)
def test_rosenbrock_ends_where_the_paper_s_rule_does(base: str, momentum: str, expected: tuple[float, float]) -> None:
    found = final_position(f"{base} | lookahead(k=5, alpha=0.5, pullback_momentum='{momentum}')")
    assert found == pytest.approx(expected, abs=1e-9)


def test_nested_lookahead_is_exact() -> None:
    # the slow weights of the inner one follow when the outer one moves the parameters
    found = final_position("sgd(lr=1e-3, momentum=0.9) | lookahead(k=5) | lookahead(k=10, label='outer')")
    assert found == pytest.approx((0.6512031314985856, 0.422493854202198), abs=1e-9)


def test_the_first_sync_moves_the_weights() -> None:
    x = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    opt = metaopt.build([x], "sgd(lr=0.1) | lookahead(k=2, alpha=0.5)")
    for _ in range(2):
        x.grad = torch.ones_like(x)
        opt.step()
    # fast: 1 -> 0.8; slow: 1 + 0.5 (0.8 - 1)
    assert x.item() == pytest.approx(0.9, abs=1e-15)
    assert opt.state[x]["lookahead.slow"].item() == x.item()


@pytest.mark.parametrize("alpha", [0.3, 1.0, 1.7])
def test_every_step_follows_the_rule_on_plain_tensors(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, generator=generator, dtype=torch.float64)
    x = torch.nn.Parameter(start.clone())
    opt = metaopt.build([x], f"sgd(lr=0.1) | lookahead(k=3, alpha={alpha})")
    fast, slow = start.clone(), start.clone()
    for step in range(1, 20):
        gradient = torch.randn(7, generator=generator, dtype=torch.float64)
        x.grad = gradient.clone()
        opt.step()
        fast = fast - 0.1 * gradient
        if step % 3 == 0:
            slow = slow + alpha * (fast - slow)
            fast = slow.clone()
        torch.testing.assert_close(x.detach(), fast, rtol=1e-13, atol=1e-14)


def test_averaged_shows_the_slow_weights_and_gives_the_fast_ones_back() -> None:
    x = torch.nn.Parameter(torch.ones(3))
    opt = metaopt.build([x], "sgd(lr=0.1) | lookahead(k=5)")
    for _ in range(3):
        x.grad = torch.ones(3)
        opt.step()
    fast = x.detach().clone()
    with opt.averaged():
        assert torch.equal(x.detach(), torch.ones(3))
        with pytest.raises(metaopt.StepError, match="leave the context"):
            opt.step()
    assert torch.equal(x.detach(), fast)


def test_float32_slow_weights_of_a_bfloat16_model_survive_a_swap_and_a_checkpoint() -> None:
    x = torch.nn.Parameter(torch.linspace(0, 1, 9).bfloat16())
    opt = metaopt.build([x], "sgd(lr=0.1) | lookahead(k=2, slow_dtype='float32')")
    for step in range(7):
        x.grad = torch.full_like(x, 0.01 * step)
        opt.step()
    slow = opt.state[x]["lookahead.slow"].clone()
    assert slow.dtype == torch.float32
    fast = x.detach().clone()
    with opt.averaged():
        assert torch.equal(x.detach(), slow.bfloat16())
    assert torch.equal(x.detach(), fast)
    assert torch.equal(opt.state[x]["lookahead.slow"], slow)
    y = torch.nn.Parameter(x.detach().clone())
    again = metaopt.build([y], "sgd(lr=0.1) | lookahead(k=2, slow_dtype='float32')")
    again.load_state_dict(opt.state_dict())
    assert torch.equal(again.state[y]["lookahead.slow"], slow)


def noisy_quadratic_variance_ratio(gamma: float, a: float, k: int, alpha: float) -> float:
    """Return the steady-state variance of the slow weights over that of SGD, by the stack's impulse response.

    x <- x - gamma (a x + a n): each unit of noise adds its squared response at the syncs.
    """

    def responses(spec: str, period: int, cycles: int) -> float:
        total = 0.0
        for phase in range(period):
            x = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
            opt = metaopt.build([x], spec)
            for step in range(period * cycles):
                x.grad = a * x.detach() + (a if step == phase else 0.0)
                opt.step()
                if (step + 1) % period == 0:
                    total += x.item() ** 2
        return total

    lookahead = responses(f"sgd(lr={gamma}) | lookahead(k={k}, alpha={alpha})", k, 120)
    sgd = responses(f"sgd(lr={gamma})", 1, 400)
    return lookahead / sgd


@pytest.mark.parametrize(
    ("gamma", "a", "k", "alpha", "expected"),
    [
        (0.1, 1.0, 5, 0.5, 0.442972964692841),
        (0.1, 1.0, 10, 0.5, 0.402749461981702),
        (0.1, 1.0, 5, 0.8, 0.760821625551904),
        (1.9, 1.0, 5, 0.5, 0.169955717137509),
    ],
)
def test_steady_state_variance_of_the_noisy_quadratic(
    gamma: float, a: float, k: int, alpha: float, expected: float
) -> None:
    assert noisy_quadratic_variance_ratio(gamma, a, k, alpha) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(
    ("gamma", "k", "alpha", "expected"),
    [(0.1, 5, 0.5, 0.442972964692841), (0.1, 5, 0.8, 0.760821625551904), (1.9, 5, 0.5, 0.169955717137509)],
)
def test_the_simulated_noisy_quadratic_has_that_variance_too(
    gamma: float, k: int, alpha: float, expected: float
) -> None:
    # independent runs are the elements of one parameter: the loss is (x - c)^2 / 2 with c ~ N(0, 1) at every update
    runs, forgotten, counted = 50_000, 40, 40

    def variance(spec: str) -> float:
        generator = torch.Generator().manual_seed(0)
        x = torch.nn.Parameter(torch.zeros(runs))
        opt = metaopt.build([x], spec)
        total = 0.0
        for cycle in range(forgotten + counted):
            for _ in range(k):
                x.grad = x.detach() - torch.randn(runs, generator=generator)
                opt.step()
            total += x.detach().square().mean().item() * (cycle >= forgotten)
        return total / counted

    sgd, lookahead = variance(f"sgd(lr={gamma})"), variance(f"sgd(lr={gamma}) | lookahead(k={k}, alpha={alpha})")
    assert sgd == pytest.approx(gamma**2 / (1 - (1 - gamma) ** 2), rel=0.02)
    assert lookahead / sgd == pytest.approx(expected, rel=0.02)
