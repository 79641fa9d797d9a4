"""The wrappers of the family in narrow places: no gradient, extreme numbers, other signs, groups, schedules, loads."""

import math
from collections.abc import Callable

import pytest
import torch

import metaopt


def closure_of(x: torch.nn.Parameter, gradient: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Return a closure that sets the gradient by a formula."""

    def closure() -> torch.Tensor:
        x.grad = gradient(x.detach())
        return torch.zeros(())

    return closure


def test_a_clip_of_a_skipped_update_does_not_reach_the_next_one() -> None:
    x = torch.nn.Parameter(torch.ones(2))
    opt = metaopt.build([x], "sam | clip_grad_norm(1.0) | skip_nonfinite(5) | sgd(lr=0.1)")
    opt.step(closure_of(x, lambda w: torch.tensor([math.nan, 1.0])))
    assert opt.skipped is not None
    opt.step(closure_of(x, lambda w: 2 * w))
    assert opt.skipped is None and opt.updates == 1
    assert torch.isfinite(x).all()


WRAPPERS = {
    "sam": "sam(rho=0.1)",
    "asam": "sam(rho=1.0, adaptive=True)",
    "adaptive_grad_clip": "adaptive_grad_clip(0.05)",
    "centralize": "centralize",
    "accumulate": "accumulate(1)",
    "skip_nonfinite": "skip_nonfinite(2)",
    "clip_grad_norm": "clip_grad_norm(1.0)",
    "clip_grad_value": "clip_grad_value(1.0)",
    "l2": "l2(0.1)",
    "decay": "decay(0.1)",
    "lookahead": "lookahead(k=2)",
    "outer": "outer(k=2)",
    "ema": "ema(0.9)",
    "cautious": "cautious",
    "cautious_decay": "cautious_decay(0.5)",
    "hyperball": "hyperball",
    "update_floor": "update_floor(2.0)",
    "radial_brake": "radial_brake",
    "trust_ratio": "trust_ratio",
    "clip_update_rms": "clip_update_rms(0.1)",
    "clip_update_norm": "clip_update_norm(0.1)",
}
BEHIND = tuple(WRAPPERS)[tuple(WRAPPERS).index("lookahead") :]


def around(name: str, base: str) -> str:
    return f"{base} | {WRAPPERS[name]}" if name in BEHIND else f"{WRAPPERS[name]} | {base}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(set(WRAPPERS) - {"l2", "decay", "cautious_decay"}))
def test_zero_gradients_move_nothing(name: str, dtype: torch.dtype) -> None:
    start = torch.tensor([[0.0, 1.0], [-2.0, 0.5]], dtype=dtype)
    x, scalar = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.tensor(0.5, dtype=dtype))
    opt = metaopt.build([x, scalar], around(name, "sgd(lr=0.1, momentum=0.9)"))

    def closure() -> torch.Tensor:
        assert torch.isfinite(x).all()
        x.grad, scalar.grad = torch.zeros_like(x), torch.zeros_like(scalar)
        return torch.zeros(())

    for _ in range(3):
        opt.step(closure)
    assert opt.updates == 3
    assert torch.equal(x.detach(), start) and scalar.item() == 0.5


@pytest.mark.parametrize("name", sorted(WRAPPERS))
def test_a_parameter_without_a_gradient_stays_and_harms_nobody(name: str) -> None:
    def train(*, silent: bool) -> tuple[torch.nn.Parameter, torch.nn.Parameter | None]:
        x = torch.nn.Parameter(torch.linspace(-1, 1, 4, dtype=torch.float64))
        quiet = torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) if silent else None
        members = [quiet, x] if quiet is not None else [x]
        opt = metaopt.build(members, around(name, "adam(lr=0.1)"))
        for _ in range(4):
            opt.step(closure_of(x, lambda w: 3 * w + 0.5))
        return x, quiet

    x, quiet = train(silent=True)
    alone, _ = train(silent=False)
    assert quiet is not None and torch.equal(quiet.detach(), torch.ones(3, dtype=torch.float64))
    assert torch.equal(x.detach(), alone.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(WRAPPERS))
def test_sixteen_bits_follow_float32_as_far_as_they_can(name: str, dtype: torch.dtype) -> None:
    def end(dtype: torch.dtype) -> torch.Tensor:
        x = torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(4, 3).to(dtype))
        opt = metaopt.build([x], around(name, "sgd(lr=0.05)"))
        for _ in range(6):
            opt.step(closure_of(x, lambda w: 3 * w + 0.5))
        return x.detach().float()

    torch.testing.assert_close(end(dtype), end(torch.float32), rtol=0.05, atol=0.02)


def test_sam_climbs_as_far_where_gradients_are_tiny_in_sixteen_bits() -> None:
    x = torch.nn.Parameter(torch.zeros(4, dtype=torch.float16))
    seen = []

    def closure() -> torch.Tensor:
        seen.append(x.detach().clone())
        x.grad = torch.full_like(x, 1e-6)
        return torch.zeros(())

    metaopt.build([x], "sam(rho=0.5) | sgd(lr=0.1)").step(closure)
    torch.testing.assert_close(seen[1], torch.full_like(x, 0.25), rtol=0.1, atol=0)


@pytest.mark.parametrize("size", [1e-4, 1.0])
def test_a_cautious_update_of_a_large_half_precision_tensor_is_not_lost(size: float) -> None:
    # its mean and its products leave the range of 16 bits
    x = torch.nn.Parameter(torch.zeros(100_000, dtype=torch.float16))
    opt = metaopt.build([x], "sgd(lr=0.1) | cautious")
    opt.step(closure_of(x, lambda w: torch.full_like(w, size)))
    torch.testing.assert_close(x.detach(), torch.full_like(x, -0.1 * size), rtol=0.01, atol=0)


def test_the_mean_of_a_large_half_precision_row_is_finite() -> None:
    x = torch.nn.Parameter(torch.zeros(2, 100_000, dtype=torch.float16))
    opt = metaopt.build([x], "centralize | sgd(lr=1.0)")
    gradient = torch.tensor([3.0, 1.0], dtype=torch.float16).repeat(2, 50_000)
    opt.step(closure_of(x, lambda w: gradient.clone()))
    assert torch.equal(x.detach(), -(gradient - 2))


@pytest.mark.parametrize("base", ["sgd(lr=0.1, momentum=0.9, {})", "adam(lr=0.1, {})"])
def test_l2_shrinks_also_where_the_base_maximizes(base: str) -> None:
    ends = []
    for spec in ("l2(0.1) | " + base.format("maximize=True"), base.format("maximize=True, weight_decay=0.1")):
        x = torch.nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))
        opt = metaopt.build([x], spec)
        for _ in range(20):
            opt.step(closure_of(x, torch.cos))
        ends.append(x.detach())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", sorted(set(WRAPPERS) - {"l2", "accumulate"}))
def test_going_up_a_loss_is_going_down_its_negative(name: str) -> None:
    def end(sign: float, base: str) -> torch.Tensor:
        x = torch.nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))
        opt = metaopt.build([x], around(name, base))
        for _ in range(20):
            opt.step(closure_of(x, lambda w: sign * torch.cos(2 * w)))
        return x.detach()

    up, down = end(1.0, "adam(lr=0.1, maximize=True)"), end(-1.0, "adam(lr=0.1)")
    torch.testing.assert_close(up, down, rtol=1e-12, atol=1e-14)


def test_sam_s_gradient_is_the_second_one_alone_also_where_the_closure_clears_nothing() -> None:
    x = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    opt = metaopt.build([x], "sam(rho=0.5) | sgd(lr=0.1)")

    def closure() -> torch.Tensor:
        loss = x.square().sum()
        loss.backward()
        return loss

    loss = opt.step(closure)
    # the gradient at (3, 4) points along (0.6, 0.8), so the second evaluation is at (3.3, 4.4)
    torch.testing.assert_close(x.detach(), torch.tensor([3.0 - 0.66, 4.0 - 0.88], dtype=torch.float64))
    assert loss.item() == 25.0


def test_a_gradient_that_is_not_a_number_leads_sam_nowhere() -> None:
    x, y = (torch.nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2))
    opt = metaopt.build([x, y], "sam(rho=0.5) | skip_nonfinite(2) | sgd(lr=0.1)")
    evaluations = []

    def closure() -> torch.Tensor:
        # the first evaluation alone overflows, so there is no direction to climb in
        evaluations.append(1)
        x.grad = 2 * x.detach()
        y.grad = torch.full_like(y, math.nan if len(evaluations) == 1 else 1.0)
        return torch.zeros(())

    opt.step(closure)
    assert opt.skipped == "gradients that are not finite" and opt.updates == 0
    assert torch.equal(x.detach(), torch.tensor([3.0, 4.0])) and torch.equal(x, y)


def test_grad_scaler_and_sam_refuse_each_other_with_the_reason() -> None:
    x = torch.nn.Parameter(torch.ones(2))
    opt = metaopt.build([x], "sam | sgd(lr=0.1)")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(x.square().sum()).backward()
    with pytest.raises(metaopt.StepError, match=r"GradScaler\.step\(\) cannot hand one over"):
        scaler.step(opt)
    assert torch.equal(x.detach(), torch.ones(2)) and opt.updates == 0


def test_a_skipped_micro_batch_leaves_no_trace_where_nobody_clears_gradients() -> None:
    ends = []
    for gradients in ((1.0, math.nan, 2.0, 3.0, math.inf, 4.0), (1.0, 2.0, 3.0, 4.0)):
        x = torch.nn.Parameter(torch.ones(1))
        opt = metaopt.build([x], "skip_nonfinite(2) | accumulate(2) | sgd(lr=0.1)")
        for g in gradients:
            (x * g).sum().backward()
            opt.step()
        assert opt.updates == 2
        ends.append(x.item())
    assert ends[0] == ends[1]


def test_the_gradients_of_the_error_are_there_to_look_at() -> None:
    x = torch.nn.Parameter(torch.ones(2))
    opt = metaopt.build([x], "skip_nonfinite(1) | sgd(lr=0.1)")
    x.grad = torch.tensor([1.0, math.nan])
    with pytest.raises(metaopt.StepError, match="not finite"):
        opt.step()
    assert x.grad is not None and x.grad.isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("base", ["sgd", "sgd(momentum=0.9)", "adam", "adamw", "adagrad"])
def test_every_weight_moves_whatever_kernel_is_chosen(base: str, dtype: torch.dtype) -> None:
    # torch 2.13's fused SGD leaves whole vectors of 16-bit weights where they are on a CPU
    x = torch.nn.Parameter(torch.ones(1000, dtype=dtype))
    opt = metaopt.build([x], base.replace(")", ", lr=0.1)") if "(" in base else f"{base}(lr=0.1)")
    x.grad = torch.ones_like(x)
    opt.step()
    assert (x < 1).all()


def test_a_cautious_update_of_complex_weights_goes_by_their_direction() -> None:
    x = torch.nn.Parameter(torch.zeros(4, dtype=torch.complex64))
    opt = metaopt.build([x], "sgd(lr=0.1, momentum=0.9) | cautious")
    first = torch.tensor([1 + 1j, 1 + 1j, 1 + 1j, 1 + 1j])
    second = torch.tensor([1 + 1j, -0.1 + 2j, -0.5 - 0.5j, -0.1 - 0.2j])
    opt.step(closure_of(x, lambda w: first.clone()))
    before = x.detach().clone()
    opt.step(closure_of(x, lambda w: second.clone()))
    update = -0.1 * (0.9 * first + second)
    # by more than a right angle away from its gradient
    agrees = (update * second.conj()).real < 0
    assert agrees.tolist() == [True, True, False, False]
    torch.testing.assert_close(x.detach() - before, update * agrees / 0.5)


def test_sam_without_a_closure_says_what_it_needs() -> None:
    x = torch.nn.Parameter(torch.ones(2))
    opt = metaopt.build([x], "sam | sgd(lr=0.1)")
    x.grad = torch.ones(2)
    with pytest.raises(metaopt.StepError, match=r"step\(closure\)"):
        opt.step()


def test_the_weights_come_back_when_the_second_evaluation_raises() -> None:
    x = torch.nn.Parameter(torch.ones(2))
    opt = metaopt.build([x], "sam | sgd(lr=0.1)")
    calls = []

    def closure() -> torch.Tensor:
        calls.append(x.detach().clone())
        if len(calls) == 2:
            raise ValueError("out of data")
        x.grad = torch.ones(2)
        return torch.zeros(())

    with pytest.raises(ValueError, match="out of data"):
        opt.step(closure)
    assert not torch.equal(calls[0], calls[1])
    assert torch.equal(x, calls[0])
    assert opt.updates == 0


@pytest.mark.parametrize("part", ["sam", "accumulate(2)", "skip_nonfinite(3)"])
def test_a_base_that_evaluates_by_itself_is_refused_with_the_reason(part: str) -> None:
    with pytest.raises(metaopt.SpecError, match="do not go together"):
        metaopt.build([torch.nn.Parameter(torch.ones(2))], f"{part} | lbfgs")


def test_cautious_over_a_base_that_evaluates_by_itself_is_refused() -> None:
    with pytest.raises(metaopt.SpecError, match="do not go together"):
        metaopt.build([torch.nn.Parameter(torch.ones(2))], "lbfgs | cautious")


def test_cautious_over_a_base_that_takes_gradients_away_says_so() -> None:
    class Taking(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.zero_grad()

    x = torch.nn.Parameter(torch.ones(2))
    opt = metaopt.build([x], [Taking, metaopt.cautious()])
    x.grad = torch.ones(2)
    with pytest.raises(metaopt.StepError, match="takes them away"):
        opt.step()


def test_a_large_finite_gradient_is_no_reason_to_skip() -> None:
    x = torch.nn.Parameter(torch.ones(2))
    opt = metaopt.build([x], "skip_nonfinite(1) | sgd(lr=1e-38)")
    x.grad = torch.full((2,), 3e38)  # its 2-norm overflows
    opt.step()
    assert opt.updates == 1
