"""Reported faults with bases of every kind, each as the behaviour that is right."""

import copy
from typing import Any

import pytest
import torch
from small_runs import assert_same

import metaopt


def parameters(count: int = 1, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(4, dtype=dtype)) for _ in range(count)]


def steps(opt: Any, params: list[torch.nn.Parameter], numbers: range) -> None:
    for number in numbers:
        for p in params:
            p.grad = torch.full_like(p, 0.5 + 0.1 * number)
        opt.step()


# ---- bases that draw random numbers


class Drawing(torch.optim.Optimizer):
    """SGD along a direction that is drawn for a parameter at its first update."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if "direction" not in state:
                        state["direction"] = torch.rand_like(p)
                    p.addcmul_(p.grad, state["direction"], value=-group["lr"])


RESET = "lookahead(k=2, pullback_momentum='reset')"


@pytest.mark.parametrize("spec", [RESET, f"accumulate(2) | {RESET}"])
def test_making_a_stack_draws_no_random_number(spec: str) -> None:
    base = Drawing(parameters())
    before = torch.get_rng_state()
    metaopt.wrap(base, spec)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dropped_by", ["reset_state", "lookahead"])
def test_saving_draws_no_random_number_and_changes_nothing(dropped_by: str) -> None:
    params = parameters(2)
    opt = metaopt.wrap(Drawing(params), RESET if dropped_by == "lookahead" else "lookahead(k=2)")
    steps(opt, params, range(2))
    if dropped_by == "reset_state":
        opt.reset_state("moments")
    before, drawn = copy.deepcopy([dict(opt.state.get(p, {})) for p in params]), torch.get_rng_state()
    saved = opt.state_dict()
    assert torch.equal(torch.get_rng_state(), drawn)
    assert_same([dict(opt.state.get(p, {})) for p in params], before)
    assert_same(opt.state_dict(), saved)


# ---- bases whose constructor makes their state, and only it


class FromConstructor(torch.optim.Optimizer):
    """Adagrad without a safety net: the sums are made in the constructor and nowhere else."""

    def __init__(self, params: Any, lr: float = 0.1, counts: bool = True) -> None:
        super().__init__(params, {"lr": lr, "counts": counts})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sum"] = torch.zeros_like(p)
                if counts:
                    self.state[p]["step"] = torch.tensor(0.0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    total = self.state[p]["sum"]
                    if group["counts"]:
                        self.state[p]["step"] += 1
                    total.addcmul_(p.grad, p.grad)
                    p.addcdiv_(p.grad, total.sqrt().add_(1e-8), value=-group["lr"])


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("spec", [[], "lookahead(k=2)"], ids=str)
def test_state_of_the_constructor_begins_anew_after_its_moments_are_reset(spec: Any, counts: bool) -> None:
    params = parameters()
    opt = metaopt.wrap(FromConstructor(params, counts=counts), spec)
    steps(opt, params, range(3))
    opt.reset_state()
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    fresh = metaopt.wrap(FromConstructor(others, counts=counts), spec)
    steps(opt, params, range(3, 6))
    steps(fresh, others, range(3, 6))
    assert_same([p.detach() for p in params], [p.detach() for p in others])


@pytest.mark.parametrize("spec", [[], "lookahead(k=2)"], ids=str)
def test_a_run_rewinds_to_before_the_first_update_over_a_base_whose_constructor_makes_its_state(
    spec: Any,
) -> None:
    params = parameters()
    opt = metaopt.wrap(FromConstructor(params), spec)
    saved = copy.deepcopy(opt.state_dict())
    steps(opt, params, range(4))
    once = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p in params:
            p.fill_(1.0)
    opt.load_state_dict(saved)
    steps(opt, params, range(4))
    assert_same([p.detach() for p in params], once)


# ---- accumulation


class Counted(torch.optim.Optimizer):
    """SGD whose rate falls with the number of its steps, counted once for all parameters, where `place` says."""

    def __init__(self, params: Any, lr: float = 0.1, place: str = "attribute") -> None:
        super().__init__(params, {"lr": lr})
        self.place, self.made, self.calls = place, 0, []  # type: ignore[var-annotated]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.calls.append(1)
        if self.place == "state":
            made = self.state["made"] = self.state.get("made", 0) + 1
        else:
            made = self.made = self.made + 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p].setdefault("seen", torch.zeros(())).add_(1)
                    p.add_(p.grad, alpha=-group["lr"] / made)


@pytest.mark.parametrize("place", ["attribute", "state"])
@pytest.mark.parametrize("window", [1, 2])
def test_accumulate_steps_the_base_once_per_window_and_never_for_its_state(window: int, place: str) -> None:
    params, others = parameters(), parameters()
    base, bare = Counted(params, place=place), Counted(others, place=place)
    opt = metaopt.wrap(base, f"accumulate({window})")
    for number in range(3):
        for _ in range(window):
            steps(opt, params, range(number, number + 1))
        steps(bare, others, range(number, number + 1))
    assert (len(base.calls), opt.updates) == (3, 3)
    torch.testing.assert_close(params, others)


@pytest.mark.parametrize("base", ["adam", "adamw", "adagrad", "adamax", "nadam", "rmsprop"])
def test_weights_of_16_bits_stay_finite_under_accumulate(base: str) -> None:
    spec = f"{base}(lr=0.1, foreach=False)"
    params, others = parameters(dtype=torch.float16), parameters(dtype=torch.float16)
    opt, bare = metaopt.build(params, f"accumulate(1) | {spec}"), metaopt.build(others, spec)
    steps(opt, params, range(3))
    steps(bare, others, range(3))
    assert all(torch.isfinite(p).all() for p in params)
    assert_same([p.detach() for p in params], [p.detach() for p in others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_of_many_gradients_of_16_bits_is_exact(dtype: torch.dtype) -> None:
    count = 512 if dtype is torch.bfloat16 else 4096
    p = torch.nn.Parameter(torch.zeros(4, dtype=dtype))
    opt = metaopt.build([p], f"accumulate({count}) | sgd(lr=1.0)")
    for _ in range(count):
        p.grad = torch.ones_like(p)
        opt.step()
    assert opt.updates == 1
    torch.testing.assert_close(p.detach(), torch.full_like(p, -1.0).detach(), rtol=0.0, atol=0.0)


# ---- what a base has of its own


class Telling(torch.optim.SGD):
    """SGD with a `zero_grad` of its own, a `step` that takes another keyword, and an answer without a closure."""

    cleared = 0
    hessian: Any = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.cleared += 1
        super().zero_grad(set_to_none)

    def step(self, closure: Any = None, *, hessian: Any = None) -> Any:
        self.hessian = hessian
        loss = super().step(closure)
        return "stepped" if loss is None else loss


@pytest.mark.parametrize("spec", [[], "lookahead(k=2)"], ids=str)
def test_the_zero_grad_of_the_base_is_called(spec: Any) -> None:
    (p,) = parameters()
    base = Telling([p], lr=0.1)
    opt = metaopt.wrap(base, spec)
    p.grad = torch.ones_like(p)
    opt.zero_grad()
    assert (base.cleared, p.grad) == (1, None)
    p.grad = torch.ones_like(p)
    opt.zero_grad(set_to_none=False)
    assert base.cleared == 2 and torch.equal(p.grad, torch.zeros(4))


@pytest.mark.parametrize("spec", [[], "lookahead(k=2)"], ids=str)
def test_what_the_step_of_the_base_returns_is_returned(spec: Any) -> None:
    (p,) = parameters()
    opt = metaopt.wrap(Telling([p], lr=0.1), spec)
    p.grad = torch.ones_like(p)
    assert opt.step() == "stepped"


@pytest.mark.parametrize("spec", [[], "lookahead(k=2)"], ids=str)
def test_keywords_of_a_step_reach_a_base_that_takes_them(spec: Any) -> None:
    (p,) = parameters()
    base = Telling([p], lr=0.1)
    opt = metaopt.wrap(base, spec)
    p.grad = torch.ones_like(p)
    curvature = torch.ones(4)
    opt.step(hessian=curvature)
    assert base.hessian is curvature and opt.updates == 1
    assert torch.equal(p.detach(), torch.full((4,), 0.9))


def test_an_update_may_be_differentiated_through_where_no_part_forbids_it() -> None:
    """torch's own recipe: parameters that are results of others, and a base that keeps the graph."""
    rate = torch.tensor(0.5, requires_grad=True)

    def gradient(make: Any) -> torch.Tensor:
        start = torch.ones(4, requires_grad=True)
        p = start.clone()
        p.grad = start * rate
        p.retain_grad()
        opt = make(torch.optim.SGD([p], lr=0.1, differentiable=True))
        opt.step()
        (found,) = torch.autograd.grad(p.sum(), rate)
        return found

    assert_same(gradient(lambda base: metaopt.wrap(base, [])), gradient(lambda base: base))
