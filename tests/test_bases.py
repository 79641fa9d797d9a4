"""Bases as others write them: counts in groups, numbers and matrices in the state, dtypes of their own, late starts."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import metaopt


class Base(torch.optim.Optimizer):
    """p <- p - lr * direction(p, state of p, its group)."""

    def __init__(self, params: object, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            self.begin(group)
            for p in (p for p in group["params"] if p.grad is not None):
                p.sub_(self.direction(p, self.state[p], group), alpha=group["lr"])

    def begin(self, group: dict) -> None:
        pass

    def direction(self, p: torch.Tensor, state: dict, group: dict) -> torch.Tensor:
        return p.grad


class CountsInItsGroups(Base):
    def begin(self, group: dict) -> None:
        group["step"] = group.get("step", 0) + 1

    def direction(self, p: torch.Tensor, state: dict, group: dict) -> torch.Tensor:
        state.setdefault("seen", torch.zeros_like(p)).add_(p.grad)
        p.mul_(0.9)  # at any rate, also at 0
        return p.grad / group["step"]


class KeepsAMatrixForEachDimension(Base):
    def direction(self, p: torch.Tensor, state: dict, group: dict) -> torch.Tensor:
        rows = state.setdefault("rows", torch.zeros(len(p), len(p)))
        rows += p.grad @ p.grad.T
        return torch.linalg.solve(torch.eye(len(p)) + rows, p.grad)


class KeepsANumberOfTheRun(Base):
    def __init__(self, params: object, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.state["count"] = 0

    def begin(self, group: dict) -> None:
        self.state["count"] += 1

    def direction(self, p: torch.Tensor, state: dict, group: dict) -> torch.Tensor:
        return p.grad / self.state["count"]


Pair = tuple[torch.nn.Linear, metaopt.Stack]


def wrapped(kind: type[Base], inputs: int = 3) -> Pair:
    torch.manual_seed(0)
    model = torch.nn.Linear(inputs, 5, bias=False)
    return model, metaopt.wrap(kind(model.parameters()), "lookahead(k=2)")


def train(model: torch.nn.Module, opt: metaopt.Stack, first: int, last: int) -> torch.Tensor:
    weight = next(model.parameters())
    for step in range(first, last):
        data = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(step)).to(weight.dtype)
        opt.zero_grad()
        model(data).square().mean().backward()
        opt.step()
    return weight.detach().clone()


def resumed(make: Callable[[], Pair], step: int) -> torch.Tensor:
    """Return where a run ends that was saved at a step and went on from its checkpoint."""
    model, opt = make()
    train(model, opt, 0, step)
    twin, other = make()
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    return train(twin, other, step, 7)


def test_a_state_dict_taken_early_neither_counts_in_the_base_s_groups_nor_moves_the_weights() -> None:
    model, opt = wrapped(CountsInItsGroups)
    before = model.weight.detach().clone()
    get_optimizer_state_dict(model, opt)
    assert torch.equal(model.weight, before)
    assert torch.equal(train(model, opt, 0, 5), train(*wrapped(CountsInItsGroups), 0, 5))


@pytest.mark.parametrize("kind", [CountsInItsGroups, KeepsAMatrixForEachDimension, KeepsANumberOfTheRun])
@pytest.mark.parametrize("step", [0, 3])
def test_it_resumes_where_it_was_saved(kind: type[Base], step: int) -> None:
    assert torch.equal(resumed(lambda: wrapped(kind), step), train(*wrapped(kind), 0, 7))


def test_state_of_another_shape_is_still_another_model_s() -> None:
    _, opt = wrapped(KeepsAMatrixForEachDimension)
    model, other = wrapped(KeepsAMatrixForEachDimension, inputs=4)
    train(model, other, 0, 2)
    with pytest.raises(metaopt.CheckpointError, match="another model"):
        opt.load_state_dict(other.state_dict())


def built(spec: str, dtype: torch.dtype) -> Pair:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 5, bias=False, dtype=dtype)
    return model, metaopt.build(model, spec)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_a_base_keeps_in_float32_comes_back_as_it_was(dtype: torch.dtype) -> None:
    # torch's NAdam keeps the product of its momenta so, whatever the parameter is
    model, opt = built("nadam", dtype)
    train(model, opt, 0, 3)
    saved = opt.state_dict()
    _, other = built("nadam", dtype)
    other.load_state_dict(copy.deepcopy(saved))
    (held,), (expected,) = other.state.values(), opt.state.values()
    assert expected["mu_product"].dtype == torch.float32
    assert held["mu_product"].dtype == torch.float32
    assert torch.equal(held["mu_product"], expected["mu_product"])
    assert held["exp_avg"].dtype == dtype
    assert torch.equal(resumed(lambda: built("nadam", dtype), 3), train(*built("nadam", dtype), 0, 7))


def test_a_float32_checkpoint_still_loads_into_a_bfloat16_model() -> None:
    model, opt = built("adamw", torch.float32)
    train(model, opt, 0, 3)
    _, other = built("adamw", torch.bfloat16)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    (held,) = other.state.values()
    assert held["exp_avg"].dtype == torch.bfloat16


def test_a_gradient_that_comes_late_joins_a_fused_sgd_with_momentum() -> None:
    def run(fused: bool | None) -> list[torch.Tensor]:
        early, late = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
        spec = "sgd(lr=0.1, momentum=0.9)" if fused is None else f"sgd(lr=0.1, momentum=0.9, fused={fused})"
        opt = metaopt.build([early, late], spec)
        for step in range(5):
            early.grad, late.grad = torch.ones(3), torch.ones(3) if step >= 2 else None
            opt.step()
        assert fused is not None or opt.param_groups[0]["fused"]
        return [early.detach(), late.detach()]

    for ours, plain in zip(run(None), run(False), strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch's own Adagrad
@pytest.mark.parametrize("spec", ["sgd(lr=0.1, momentum=0.9)", "adagrad(lr=0.1)"])
def test_sparse_gradients_go_on_after_a_checkpoint_was_loaded(spec: str) -> None:
    def make() -> tuple[torch.nn.Embedding, metaopt.Stack]:
        torch.manual_seed(0)
        model = torch.nn.Embedding(6, 2, sparse=True)
        return model, metaopt.build(model, spec)

    def lookups(model: torch.nn.Embedding, opt: metaopt.Stack, first: int, last: int) -> torch.Tensor:
        for step in range(first, last):
            opt.zero_grad()
            model(torch.tensor([step % 6, 1])).square().sum().backward()
            opt.step()
        return model.weight.detach().clone()

    model, opt = make()
    lookups(model, opt, 0, 3)
    twin, other = make()
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert torch.equal(lookups(twin, other, 3, 6), lookups(*make(), 0, 6))
