"""Parameters of every kind: without gradients, late, sparse, complex, of half or double precision, of no dimension."""

import copy
from typing import Any

import pytest
import torch
from small_runs import assert_same, assert_same_weights, loss_of, small_model, train, weights

import metaopt
from metaopt.engine.views.blocks import CPU_BLOCK
from metaopt.specs.parsing import parse

WRAPPERS = "clip_grad_norm(0.5) | lookahead(k=3) | ema(0.9)"


def by_hand(p: torch.Tensor, gradients: list[torch.Tensor], lr: float, k: int, alpha: float) -> torch.Tensor:
    """Return where SGD under Lookahead ends, on plain tensors."""
    fast, slow = p.detach().clone(), p.detach().clone()
    for step, gradient in enumerate(gradients, 1):
        fast = fast - lr * gradient
        if step % k == 0:
            slow = slow + alpha * (fast - slow)
            fast = slow.clone()
    return fast


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("shape", [(), (1,), (4, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("foreach", [False, True])
def test_lookahead_over_sgd_in_every_dtype_and_shape(dtype: torch.dtype, shape: Any, foreach: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    start, *gradients = (torch.randn(shape, generator=generator, dtype=wide).to(dtype) for _ in range(8))
    p = torch.nn.Parameter(start.clone())
    opt = metaopt.wrap(torch.optim.SGD([p], lr=0.1, foreach=foreach), "lookahead(k=3)")
    for gradient in gradients:
        p.grad = gradient.clone()
        opt.step()
    expected = by_hand(start.to(wide), [g.to(wide) for g in gradients], 0.1, 3, 0.5)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.complex64: 1e-5}.get(dtype, 3e-2)
    torch.testing.assert_close(p.detach().to(wide), expected, rtol=tolerance, atol=tolerance)
    assert opt.state[p]["lookahead.slow"].dtype == dtype


def test_dtypes_mix_in_one_group() -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.float16]
    together = [torch.nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3).to(dtype)) for dtype in dtypes]
    alone = copy.deepcopy(together)
    opt = (
        metaopt.build(together, "clip_grad_value(0.3) | sgd(lr=0.1, momentum=0.9) | lookahead(k=2) | ema(0.9)")
        if (False)
        else metaopt.build(together, "sgd(lr=0.1, momentum=0.9) | lookahead(k=2) | ema(0.9)")
    )
    singles = [metaopt.build([p], "sgd(lr=0.1, momentum=0.9, fused=None) | lookahead(k=2) | ema(0.9)") for p in alone]
    for step in range(5):
        for p, q in zip(together, alone, strict=True):
            p.grad, q.grad = (torch.full_like(r, 0.1 * (step + 1)) for r in (p, q))
        opt.step()
        for single in singles:
            single.step()
    for p, q, single in zip(together, alone, singles, strict=True):
        assert_same(p.detach(), q.detach())
        assert_same(opt.state[p]["ema.average"], single.state[q]["ema.average"])
    with opt.averaged("lookahead"):
        assert [p.dtype for p in together] == dtypes


def test_a_parameter_without_a_gradient_is_left_alone_and_has_no_state() -> None:
    x, frozen = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = metaopt.build([x, frozen], "clip_grad_norm(1.0) | adamw(lr=0.1) | lookahead(k=2) | ema(0.9)")
    for _ in range(5):
        x.grad = torch.ones(3)
        opt.step()
    assert frozen not in opt.state
    assert_same(frozen.detach(), torch.ones(3))
    with opt.averaged("ema"):
        assert_same(frozen.detach(), torch.ones(3))
    assert_same(frozen.detach(), torch.ones(3))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert frozen not in opt.state


@pytest.mark.parametrize("spec", ["adamw(lr=0.1)", "adagrad(lr=0.1)", "sgd(lr=0.1, momentum=0.9)", "sgd(lr=0.1)"])
def test_a_parameter_whose_first_gradient_comes_late_starts_there(spec: str) -> None:
    x, late = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = metaopt.build([x, late], f"{spec} | lookahead(k=3) | ema(0.9)")
    for _ in range(4):
        x.grad = torch.ones(3)
        opt.step()
    with torch.no_grad():
        late.fill_(7.0)  # weights may still change until a parameter's own first update
    for step in range(2):
        x.grad, late.grad = torch.ones(3), torch.ones(3)
        opt.step()
        if step == 0:
            assert_same(opt.state[late]["lookahead.slow"], torch.full((3,), 7.0))
    # the cycle is the run's, not the parameter's: the sixth update pulls both
    assert_same(opt.state[late]["lookahead.slow"], late.detach())


@pytest.mark.parametrize("spec", ["sgd(lr=0.1, momentum=0.9)", "clip_grad_norm(1e9) | sgd(lr=0.1, momentum=0.9)"])
def test_a_late_gradient_beside_momentum_where_the_stack_chose_the_fused_kernel(spec: str) -> None:
    # which torch's fused SGD refuses: it takes momentum for all parameters of a group or for none
    x, late = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    y, hand = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    opt, bare = metaopt.build([x, late], spec), torch.optim.SGD([y, hand], lr=0.1, momentum=0.9)
    assert opt.param_groups[0]["fused"]
    for step in range(6):
        x.grad, y.grad = torch.full((3,), 0.5), torch.full((3,), 0.5)
        if step >= 3:
            late.grad, hand.grad = torch.ones(3), torch.ones(3)
        opt.step()
        bare.step()
        torch.testing.assert_close([x, late], [y, hand])


def test_frozen_for_a_while_and_unfrozen_again() -> None:
    model, twin = small_model(), small_model()
    opt = metaopt.wrap(torch.optim.AdamW(model.parameters(), lr=0.01), "lookahead(k=4, alpha=1.0)")
    bare = torch.optim.AdamW(twin.parameters(), lr=0.01)
    for m, o in ((model, opt), (twin, bare)):
        train(m, o, range(3))
        m[0].requires_grad_(False)
        train(m, o, range(3, 6))
        m[0].requires_grad_(True)
        train(m, o, range(6, 9))
    assert_same_weights(model, twin)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own Adagrad
@pytest.mark.parametrize("spec", ["sgd(lr=0.1)", "sgd(lr=0.1, momentum=0.9)", "adagrad(lr=0.1)", "sparse_adam(lr=0.1)"])
@pytest.mark.parametrize("built", [True, False])
def test_sparse_gradients_train_as_without_a_stack(spec: str, built: bool) -> None:
    def embedding() -> torch.nn.Embedding:
        torch.manual_seed(0)
        return torch.nn.Embedding(6, 3, sparse=True)

    model, twin = embedding(), embedding()
    (part,) = parse(spec).parts
    bare = part.target(twin.parameters(), **part.arguments)
    # a built stack takes the fused kernel where it can, which refuses sparse gradients
    opt = (
        metaopt.build(model, f"{spec} | lookahead(k=2, alpha=1.0)")
        if built
        else metaopt.wrap(part.target(model.parameters(), **part.arguments), "lookahead(k=2, alpha=1.0)")
    )
    for step in range(5):
        for m, o in ((model, opt), (twin, bare)):
            o.zero_grad()
            m(torch.tensor([step % 6, 2, 2])).square().sum().backward()
            o.step()
    assert_same_weights(model, twin)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("spec", ["sgd(lr=0.1, momentum=0.9)", "adagrad(lr=0.1)", "adagrad(lr=0.1) | lookahead(k=2)"])
def test_a_run_with_sparse_gradients_resumes_bit_for_bit(spec: str) -> None:
    def step_of(model: torch.nn.Embedding, opt: metaopt.Stack, step: int) -> None:
        opt.zero_grad()
        model(torch.tensor([step % 6, 2, 2])).square().sum().backward()
        opt.step()

    torch.manual_seed(0)
    model = torch.nn.Embedding(6, 3, sparse=True)
    opt = metaopt.build(model, spec)
    for step in range(6):
        twin = copy.deepcopy(model)
        again = metaopt.build(twin, spec)
        again.load_state_dict(copy.deepcopy(opt.state_dict()))
        step_of(model, opt, step)
        step_of(twin, again, step)
        assert_same_weights(twin, model)


def test_a_sparse_gradient_counts_in_the_norm_and_is_clipped_with_the_others() -> None:
    torch.manual_seed(0)
    sparse, dense = torch.nn.Embedding(6, 3, sparse=True), torch.nn.Linear(3, 1)
    twins = copy.deepcopy((sparse, dense))
    opt = metaopt.build(
        [*sparse.parameters(), *dense.parameters()], "clip_grad_norm(0.1) | sgd(lr=1.0) | lookahead(k=2)"
    )
    hand = torch.optim.SGD([*twins[0].parameters(), *twins[1].parameters()], lr=1.0)
    data = torch.tensor([1, 4, 4])
    dense(sparse(data)).square().sum().backward()
    twins[1](twins[0](data)).square().sum().backward()
    for p in twins[0].parameters():
        p.grad = p.grad.to_dense()
    torch.nn.utils.clip_grad_norm_([*twins[0].parameters(), *twins[1].parameters()], 0.1)
    opt.step()
    hand.step()
    for a, b in zip((sparse, dense), twins, strict=True):
        torch.testing.assert_close(weights(a), weights(b), rtol=1e-5, atol=1e-7)


def test_sparse_and_dense_gradients_may_alternate() -> None:
    model = torch.nn.Embedding(6, 3)
    opt = metaopt.build(model, "clip_grad_norm(0.5) | sgd(lr=0.1) | lookahead(k=2) | ema(0.9)")
    for step in range(6):
        gradient = torch.zeros(6, 3)
        gradient[step] = 1.0
        model.weight.grad = gradient if step % 2 else gradient.to_sparse()
        opt.step()
    assert opt.updates == 6
    assert torch.isfinite(model.weight).all()


def test_a_stack_does_not_require_gradients_of_its_own_state() -> None:
    model = small_model()
    opt = metaopt.build(model.named_parameters(), f"clip_grad_norm(0.5) | adamw | {WRAPPERS.split(' | ', 1)[1]}")
    train(model, opt, range(4))
    for held in opt.state.values():
        assert not any(value.requires_grad for value in held.values() if isinstance(value, torch.Tensor))
    with opt.averaged("ema"):
        assert all(p.requires_grad and p.is_leaf for p in model.parameters())
        loss_of(model, 0).backward()


def test_channels_last_and_transposed_weights_keep_their_layout() -> None:
    p = torch.nn.Parameter(torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))
    q = torch.nn.Parameter(torch.randn(3, 5).t())
    strides = p.stride(), q.stride()
    opt = metaopt.build([p, q], "adamw(lr=0.1) | lookahead(k=2) | ema(0.9)")
    for _ in range(4):
        p.grad, q.grad = torch.randn_like(p), torch.randn_like(q)
        opt.step()
    with opt.averaged("ema"):
        pass
    assert (p.stride(), q.stride()) == strides
    assert opt.state[p]["lookahead.slow"].stride() == p.stride()


@pytest.mark.parametrize("spec", ["sgd(lr=0.1) | ema(0.9)", "sgd(lr=0.1) | lookahead(k=1)", "sgd(lr=0.1) | cautious"])
def test_an_empty_parameter_stands_before_ones_too_large_for_a_cache(spec: str) -> None:
    empty, large = torch.nn.Parameter(torch.ones(0, 3)), torch.nn.Parameter(torch.ones(CPU_BLOCK + 7))
    twin = torch.nn.Parameter(torch.ones(7))
    opt, plain = metaopt.build([empty, large, torch.nn.Parameter(torch.ones(3, 0))], spec), metaopt.build([twin], spec)
    for _ in range(2):
        for p in (empty, large, twin):
            p.grad = torch.ones_like(p)
        opt.step()
        plain.step()
    assert torch.equal(large.detach()[-7:], twin.detach()) and torch.equal(large.detach()[:7], twin.detach())
