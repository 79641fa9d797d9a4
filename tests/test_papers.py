"""What the papers compute, by stepping the real stack in float64, beside formulas that do not know metaopt."""

import math
from collections.abc import Callable

import pytest
import torch

import metaopt

Tensors = dict[str, torch.Tensor]

# arXiv:1907.08610 on a quadratic of condition number 100, with as much momentum as it can use
EIGENVALUES = (0.01, 1.0)
GAMMA, MOMENTUM, K, ALPHA = 1.0, 0.99, 20, 0.5


def quadratic_stack(eigenvalue: float, spec: str) -> tuple[torch.nn.Parameter, metaopt.Stack, Callable[[], None]]:
    """Return a parameter, a stack over it, and a call that makes one update on eigenvalue * x^2 / 2."""
    x = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    opt = metaopt.build([x], spec)

    def update() -> None:
        x.grad = eigenvalue * x.detach()
        opt.step()

    return x, opt, update


def held(x: torch.nn.Parameter, opt: metaopt.Stack) -> Tensors:
    """Return the whole state of a parameter: its value and every tensor that the stack keeps of it."""
    return {"value": x.data} | {key: value for key, value in opt.state[x].items() if isinstance(value, torch.Tensor)}


def cycle_matrix(eigenvalue: float, spec: str, period: int) -> torch.Tensor:
    """Return the matrix of `period` updates on the whole state, column by column from the stack itself."""
    x, opt, update = quadratic_stack(eigenvalue, spec)
    for _ in range(period):  # until every entry of the state is there
        update()
    keys = list(held(x, opt))  # after "reset" without the base's own, which a checkpoint holds as they begin
    saved = opt.state_dict()
    columns = []
    for key in keys:
        x, opt, update = quadratic_stack(eigenvalue, spec)
        opt.load_state_dict(saved)
        with torch.no_grad():
            for name, tensor in held(x, opt).items():
                tensor.fill_(float(name == key))
        for _ in range(period):
            update()
        columns.append(torch.cat([held(x, opt)[name] for name in keys]))
    return torch.stack(columns, dim=1)


def rate_per_step(matrices: list[torch.Tensor], period: int) -> float:
    """Return by which share the distance falls in one step of the slowest direction: 1 - radius^(1 / period)."""
    radius = max(float(torch.linalg.eigvals(matrix).abs().max()) for matrix in matrices)
    return 1.0 - radius ** (1.0 / period)


def cycle_by_formula(eigenvalue: float, pullback: str, alpha: float = ALPHA) -> torch.Tensor:
    """Return the matrix of a cycle on (x, v), x <- x - gamma v after v <- m v + a x, then the pull."""
    step = torch.tensor([[1.0 - GAMMA * eigenvalue, -GAMMA * MOMENTUM], [eigenvalue, MOMENTUM]], dtype=torch.float64)
    steps = torch.linalg.matrix_power(step, K)
    keep = torch.eye(2, dtype=torch.float64)
    # x goes alpha of its way; with "pullback" v does too
    pull = torch.diag(torch.tensor([alpha, alpha if pullback == "pullback" else 1.0], dtype=torch.float64))
    cycle = pull @ steps + (keep - pull)
    # with "reset" v begins every cycle at zero
    return cycle[:1, :1] if pullback == "reset" else cycle


@pytest.mark.parametrize(("pullback", "expected"), [("none", 2.4072e-2), ("reset", 5.6810e-2), ("pullback", 3.2663e-2)])
def test_a_pull_speeds_momentum_up_on_an_ill_conditioned_quadratic(pullback: str, expected: float) -> None:
    spec = f"sgd(lr={GAMMA}, momentum={MOMENTUM}) | lookahead({K}, {ALPHA}, pullback_momentum='{pullback}')"
    found = rate_per_step([cycle_matrix(a, spec, K) for a in EIGENVALUES], K)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found == pytest.approx(rate_per_step([cycle_by_formula(a, pullback) for a in EIGENVALUES], K), rel=1e-9)


@pytest.mark.parametrize("pullback", ["none", "reset", "pullback"])
def test_a_cycle_has_the_rule_s_eigenvalues_at_another_alpha_too(pullback: str) -> None:
    spec = f"sgd(lr={GAMMA}, momentum={MOMENTUM}) | lookahead({K}, 0.3, pullback_momentum='{pullback}')"
    for eigenvalue in EIGENVALUES:
        found = rate_per_step([cycle_matrix(eigenvalue, spec, K)], K)
        assert found == pytest.approx(rate_per_step([cycle_by_formula(eigenvalue, pullback, 0.3)], K), rel=1e-9)


def test_momentum_alone_is_slower_on_the_same_quadratic() -> None:
    spec = f"sgd(lr={GAMMA}, momentum={MOMENTUM})"
    found = rate_per_step([cycle_matrix(a, spec, 1) for a in EIGENVALUES], 1)
    assert found == pytest.approx(5.0126e-3, rel=1e-4)
    # its two eigenvalues are complex, and their product is the momentum
    assert found == pytest.approx(1.0 - math.sqrt(MOMENTUM), rel=1e-9)


def ravine(theta: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a convex loss that is no quadratic, in eight dimensions of unequal curvature."""
    curvatures = torch.logspace(-2, 0.5, len(theta), dtype=torch.float64)
    return curvatures * torch.tanh(theta) + 0.01 * theta


def test_torch_s_nesterov_is_exact_nesterov_seen_in_the_shifted_variable() -> None:
    lr, momentum = 0.2, 0.95
    theta = torch.linspace(-3, 2, 8, dtype=torch.float64)
    velocity = torch.zeros_like(theta)
    y = torch.nn.Parameter(theta.clone())
    opt = metaopt.build([y], f"sgd(lr={lr}, momentum={momentum}, nesterov=True)")
    for _ in range(500):
        anticipated = theta - lr * momentum * velocity
        velocity = momentum * velocity + ravine(anticipated)
        theta = theta - lr * velocity
        y.grad = ravine(y.detach())
        opt.step()
        torch.testing.assert_close(y.detach(), theta - lr * momentum * velocity, rtol=0, atol=1e-12)
        assert (y - theta).abs().max() > 0  # the shift is real: the weights themselves are not Nesterov's


# arXiv:1907.08610, proposition 1: on a quadratic the best alpha is known
CURVATURE = torch.tensor([1.0, 10.0], dtype=torch.float64)
TARGET = torch.tensor([1.0, 2.0], dtype=torch.float64)
BEST_ALPHA = 0.641130243480744


def after_one_pull(alpha: float) -> torch.Tensor:
    """Return the weights after five steps of gradient descent and one pull, on x A x / 2 - b x with A = diag(1, 10)."""
    x = torch.nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
    opt = metaopt.build([x], f"sgd(lr=0.19) | lookahead(k=5, alpha={alpha})")
    for _ in range(5):
        x.grad = CURVATURE * x.detach() - TARGET
        opt.step()
    return x.detach()


def test_the_best_alpha_on_a_quadratic_is_the_paper_s() -> None:
    def loss(x: torch.Tensor) -> float:
        return float((CURVATURE * x * x / 2 - TARGET * x).sum())

    # the loss is a parabola in alpha, and three runs of the stack determine it
    low, middle, high = (loss(after_one_pull(alpha)) for alpha in (0.5, 1.0, 1.5))
    vertex = 1.0 + 0.5 * (low - high) / (2 * (low - 2 * middle + high))
    assert vertex == pytest.approx(BEST_ALPHA, abs=1e-12)

    slow = torch.tensor([3.0, -2.0], dtype=torch.float64)
    minimum = TARGET / CURVATURE
    # each direction's error shrinks by 1 - lr a in a step
    fast = minimum + (1 - 0.19 * CURVATURE) ** 5 * (slow - minimum)
    way = slow - fast
    assert float((way * CURVATURE * (slow - minimum)).sum() / (way * CURVATURE * way).sum()) == pytest.approx(
        BEST_ALPHA, abs=1e-14
    )


Point = tuple[float, float]


def rosenbrock_gradient(x: float, y: float) -> Point:
    return -2 * (1 - x) - 400 * x * (y - x * x), 200 * (y - x * x)


def stack_end(spec: str, steps: int = 500) -> list[float]:
    x = torch.nn.Parameter(torch.tensor([-0.5, 0.5], dtype=torch.float64))
    opt = metaopt.build([x], spec)
    for _ in range(steps):
        x.grad = torch.tensor(rosenbrock_gradient(*x.tolist()), dtype=torch.float64)
        opt.step()
    return x.tolist()


def toward(start: list[float], end: list[float], alpha: float) -> list[float]:
    return [s + alpha * (e - s) for s, e in zip(start, end, strict=True)]


def test_nested_lookahead_ends_where_the_rule_on_plain_numbers_ends() -> None:
    fast, velocity = [-0.5, 0.5], [0.0, 0.0]
    inner, outer = list(fast), list(fast)
    for step in range(1, 501):
        gradient = rosenbrock_gradient(*fast)
        velocity = [0.9 * v + g for v, g in zip(velocity, gradient, strict=True)]
        fast = [x - 1e-3 * v for x, v in zip(fast, velocity, strict=True)]
        if step % 5 == 0:
            inner = fast = toward(inner, fast, 0.5)
        if step % 10 == 0:
            outer = inner = fast = toward(outer, fast, 0.5)
    assert fast == pytest.approx((0.6512031314985856, 0.422493854202198), abs=1e-9)
    stack = "sgd(lr=1e-3, momentum=0.9) | lookahead(k=5) | lookahead(k=10, label='outer')"
    assert stack_end(stack) == pytest.approx(fast, abs=1e-9)


def test_outer_nesterov_over_adam_ends_where_the_rule_on_plain_numbers_ends() -> None:
    fast, m, v = [-0.5, 0.5], [0.0, 0.0], [0.0, 0.0]
    slow, buffer = list(fast), [0.0, 0.0]
    for step in range(1, 501):
        gradient = rosenbrock_gradient(*fast)
        m = [0.9 * a + 0.1 * g for a, g in zip(m, gradient, strict=True)]
        v = [0.999 * a + 0.001 * g * g for a, g in zip(v, gradient, strict=True)]
        m_hat = [a / (1 - 0.9**step) for a in m]
        v_hat = [a / (1 - 0.999**step) for a in v]
        fast = [x - 1e-2 * a / (math.sqrt(b) + 1e-8) for x, a, b in zip(fast, m_hat, v_hat, strict=True)]
        if step % 10 == 0:
            way = [s - f for s, f in zip(slow, fast, strict=True)]
            buffer = [0.9 * b + w for b, w in zip(buffer, way, strict=True)]
            slow = [s - 0.7 * (0.9 * b + w) for s, b, w in zip(slow, buffer, way, strict=True)]
            fast = list(slow)
    assert fast == pytest.approx((0.982045850918885, 0.9642838511845989), abs=1e-9)
    assert stack_end("adam(lr=1e-2) | outer(k=10, lr=0.7, momentum=0.9)") == pytest.approx(fast, abs=1e-9)
