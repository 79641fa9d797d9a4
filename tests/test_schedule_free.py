"""`schedule_free` goes where the package schedulefree goes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import schedulefree
import torch
from reference_averages import Schedule

import metaopt

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Published:
    """An optimizer of the package schedulefree, the stack that is to equal it, and the rate that the package is set."""

    make: Callable[[list[torch.nn.Parameter]], Any]
    spec: str
    rate: Schedule | None = None


def wrapped(base: type[torch.optim.Optimizer], given: dict[str, Any], **options: Any) -> Callable[..., Any]:
    def make(params: list[torch.nn.Parameter]) -> Any:
        inner = base(params, lr=0.05, **given)
        if base is torch.optim.Adam:
            # the package's wrapper keeps z in the base's state, and Adam takes a state that is not empty for its own
            for p in params:
                zeros = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
                inner.state[p].update(step=torch.tensor(0.0), **zeros)
        return schedulefree.ScheduleFreeWrapper(inner, **options)

    return make


def adamw(**options: Any) -> Callable[..., Any]:
    return lambda params: schedulefree.AdamWScheduleFree(params, lr=0.05, **options)


def up_and_down(first: float) -> Schedule:
    return lambda t: first + (0.05 - first) * t / 30 if t < 30 else 0.05 - 0.04 * min((t - 30) / 500, 1.0)


PUBLISHED = [
    Published(wrapped(torch.optim.SGD, {}), "sgd(lr=0.05) | schedule_free"),
    Published(
        wrapped(torch.optim.SGD, {}, momentum=0.5, r=1.0, weight_decay_at_y=0.1),
        "sgd(lr=0.05) | schedule_free(0.5, r=1.0, weight_decay_at_y=0.1)",
    ),
    Published(
        wrapped(torch.optim.SGD, {"momentum": 0.9}, momentum=0.98, weight_lr_power=0.0),
        "sgd(lr=0.05, momentum=0.9) | schedule_free(0.98, weight_lr_power=0.0)",
    ),
    Published(wrapped(torch.optim.Adam, {}), "adam(lr=0.05) | schedule_free"),
    Published(
        wrapped(torch.optim.Adam, {"betas": (0.0, 0.99)}, r=2.0, weight_lr_power=1.0, weight_decay_at_y=0.05),
        "adam(lr=0.05, betas=(0.0, 0.99)) | schedule_free(r=2.0, weight_lr_power=1.0, weight_decay_at_y=0.05)",
    ),
    Published(
        wrapped(torch.optim.Adam, {}, weight_decay_at_y=0.1),
        "adam(lr=warmup(linear(0.05, 0.01, 500), 30, start=0.001)) | schedule_free(weight_decay_at_y=0.1)",
        up_and_down(0.001),
    ),
    Published(adamw(), "adamw(lr=0.05, betas=(0.0, 0.999), weight_decay=0.0) | schedule_free"),
    Published(
        adamw(betas=(0.95, 0.99), weight_decay=0.1, r=1.0, weight_lr_power=0.0, foreach=False),
        "adamw(lr=0.05, betas=(0.0, 0.99), weight_decay=0.1) | schedule_free(0.95, r=1.0, weight_lr_power=0.0)",
    ),
    Published(
        # a first rate of zero, whose update has no weight
        adamw(betas=(0.9, 0.99)),
        "adamw(lr=warmup(linear(0.05, 0.01, 500), 30), betas=(0.0, 0.99), weight_decay=0.0) | schedule_free",
        up_and_down(0.0),
    ),
    Published(
        adamw(betas=(0.9, 0.99), weight_decay=0.1, warmup_steps=40),
        f"adamw(lr=warmup(0.05, 39, start={0.05 / 40!r}), betas=(0.0, 0.99), weight_decay=0.1) | schedule_free",
    ),
]


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.spec)
def test_schedule_free_equals_the_package(published: Published) -> None:
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 3), (5,), (1,))]
    ours, theirs = ([torch.nn.Parameter(s.clone()) for s in starts] for _ in range(2))
    opt, package = metaopt.build(ours, published.spec), published.make(theirs)
    package.train()
    for number in range(1000):
        noise = [torch.randn(s.shape, generator=generator, dtype=torch.float64) for s in starts]
        for params in (ours, theirs):
            for i, (p, n) in enumerate(zip(params, noise, strict=True)):
                p.grad = (0.03 + 0.4 * i) * (p.detach() - 1.0) + 0.3 * n
        if published.rate is not None:
            package.param_groups[0]["lr"] = published.rate(number)
        package.step()
        opt.step()
        for p, q in zip(ours, theirs, strict=True):
            assert_close(p.detach(), q.detach(), f"step {number}")
        if number % 50 == 49:
            package.eval()
            with opt.averaged():
                for p, q in zip(ours, theirs, strict=True):
                    assert_close(p.detach(), q.detach(), f"the average after step {number}")
            package.train()


@pytest.mark.parametrize("number", [0, 1])
def test_a_group_of_two_dtypes_has_one_sum_of_weights(number: int) -> None:
    # the second list of an update must not count its weight again
    dtypes = (torch.float64, torch.float32) if number else (torch.float32, torch.float64)
    together = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in dtypes]
    apart = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in dtypes]
    spec = "sgd(lr=0.1) | schedule_free(r=1.0)"
    both, each = metaopt.build(together, spec), [metaopt.build([p], spec) for p in apart]
    for step in range(20):
        for p in (*together, *apart):
            p.grad = p.detach() + float(step % 3)
        both.step()
        for opt in each:
            opt.step()
    for p, q in zip(together, apart, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def assert_close(found: torch.Tensor, expected: torch.Tensor, where: str) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=lambda text: f"{where}: {text}")
