"""torch's fused kernels over kept lists: the numbers of torch's own step, whatever happens between two updates."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_runs import fill_gradients, small_model
from torch.utils._python_dispatch import TorchDispatchMode

import metaopt
from metaopt import torch_internals
from metaopt.engine.fused.uniform import UniformTensors
from metaopt.lab.shapes import shapes_of

KINDS = {
    "adamw": "adamw(lr=0.01, weight_decay=0.1)",
    "adam": "adam(lr=0.01, weight_decay=0.1, maximize=True)",
    "amsgrad": "adam(lr=0.01, amsgrad=True)",
    "momentum": "sgd(lr=0.01, momentum=0.9, nesterov=True)",
    "sgd": "sgd(lr=0.01, weight_decay=0.1)",
}
Pair = tuple[torch.nn.Module, Any]


def entries(opt: Any) -> list[dict[str, Any]]:
    return [opt.state[p] for group in opt.param_groups for p in group["params"] if p in opt.state]


def other_rate(model: torch.nn.Module, opt: Any) -> None:
    opt.param_groups[0]["lr"] = 0.002


def other_moments(model: torch.nn.Module, opt: Any) -> None:
    for entry in entries(opt):
        for key in entry:
            if key != "step":
                entry[key] = entry[key] * 0.5 if entry[key] is not None else None


def other_count(model: torch.nn.Module, opt: Any) -> None:
    for entry in entries(opt):
        if "step" in entry:
            entry["step"] = torch.tensor(100.0)


def other_entry(model: torch.nn.Module, opt: Any) -> None:
    for p, entry in list(opt.state.items()):
        opt.state[p] = {key: copy.deepcopy(value) for key, value in entry.items()}


def loaded(model: torch.nn.Module, opt: Any) -> None:
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def wide(model: torch.nn.Module, opt: Any) -> None:
    model.double()
    loaded(model, opt)  # torch casts the state to the parameters' dtype


def other_group(model: torch.nn.Module, opt: Any) -> None:
    first = opt.param_groups[0]
    last = first["params"].pop()
    opt.param_groups.append({**first, "params": [last], "lr": 0.003})


def no_momentum(model: torch.nn.Module, opt: Any) -> None:
    if "momentum" in opt.param_groups[0]:
        opt.param_groups[0].update(momentum=0.0, nesterov=False)


def slow_path(model: torch.nn.Module, opt: Any) -> None:
    opt.param_groups[0].update(fused=False, foreach=False)


def frozen(model: torch.nn.Module, opt: Any) -> None:
    next(model.parameters()).requires_grad_(requires_grad=False)


def other_memory(model: torch.nn.Module, opt: Any) -> None:
    for p in model.parameters():
        p.data = p.data.clone() * 0.5
    for entry in entries(opt):
        for value in entry.values():
            if value is not None:
                value.data = value.data.clone()


def nothing(model: torch.nn.Module, opt: Any) -> None:
    """Leave everything as it is."""


CHANGES = [
    nothing,
    other_rate,
    other_moments,
    other_count,
    other_entry,
    loaded,
    wide,
    other_group,
    no_momentum,
    slow_path,
    frozen,
    other_memory,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_updates_are_torch_s_bit_for_bit_whatever_a_client_changes(
    kind: str, change: Callable[[torch.nn.Module, Any], None]
) -> None:
    model, twin = small_model(), small_model()
    opt = metaopt.build(model, KINDS[kind], total_steps=30)
    base = type(opt.base)
    settings = {k: v for k, v in opt.base.defaults.items() if k != "decoupled_weight_decay"}
    plain = base(twin.parameters(), **settings)
    for step in range(12):
        if step in (4, 8):
            change(model, opt)
            change(twin, plain)
        fill_gradients(model, step)
        fill_gradients(twin, step)
        if step in (2, 6):
            for m in (model, twin):
                m[0].weight.grad = None
        opt.step()
        plain.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, q), step
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for key, value in plain.state.get(q, {}).items():
            assert value is None or torch.equal(opt.state[p][key], value), key


def test_a_step_that_somebody_puts_in_place_of_torch_s_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    own = torch.optim.SGD.step

    def counted(self: Any, closure: Any = None) -> Any:
        called.append(self)
        return own(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", counted)
    model = small_model()
    opt = metaopt.build(model, "sgd(lr=0.1)")
    for step in range(3):
        fill_gradients(model, step)
        opt.step()
    assert len(called) == 3


def test_a_copy_and_a_checkpoint_do_not_share_counts_with_the_run() -> None:
    model = small_model()
    opt = metaopt.build(model, "adamw(lr=0.01)")
    for step in range(4):
        fill_gradients(model, step)
        opt.step()
    saved, other = copy.deepcopy(opt.state_dict()), copy.deepcopy(opt)
    fill_gradients(model, 4)
    opt.step()
    assert {float(entry["step"]) for entry in saved["state"].values()} == {4.0}
    assert {float(entry["step"]) for entry in entries(other)} == {4.0}
    assert {float(entry["step"]) for entry in entries(opt)} == {5.0}


def rows_of_two(p: torch.Tensor) -> torch.Tensor:
    return torch.stack([p, p], dim=-1).flatten(-2)[..., ::2]


LAYOUTS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]] = {
    "gaps": (rows_of_two, torch.clone),
    "columns": (lambda p: p.mT.contiguous().mT, lambda g: g.mT.contiguous().mT),
    "columns-rows": (lambda p: p.mT.contiguous().mT, torch.clone),
    "rows-columns": (torch.clone, lambda g: g.mT.contiguous().mT),
    "expanded": (torch.clone, lambda g: g[:, :1].expand_as(g)),
}


@pytest.mark.parametrize("tail", ["", " | cautious", " | update_floor | cautious_decay"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_and_gradients_with_any_strides_are_updated_rightly(layout: str, kind: str, tail: str) -> None:
    # torch's fused kernels on a processor read memory in its own order, without an error
    arrange, arrange_gradient = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 6, generator=generator)
    p, plain = torch.nn.Parameter(arrange(start)), torch.nn.Parameter(start.clone())
    assert torch.equal(p, plain)
    base, _, settings = KINDS[kind].partition("(")
    opt = metaopt.build([p], KINDS[kind] + tail)
    twin = metaopt.build([plain], f"{base}(fused=False, foreach=False, {settings}{tail}")
    for step in range(5):
        gradient = torch.randn(4, 6, generator=generator)
        p.grad = gradient.clone() if step == 0 else arrange_gradient(gradient)
        plain.grad = p.grad.clone(memory_format=torch.contiguous_format)
        opt.step()
        twin.step()
    torch.testing.assert_close(p.detach(), plain.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "momentum"])
def test_parameters_may_exchange_their_state(kind: str) -> None:
    params, twins = ([torch.nn.Parameter(torch.full((3,), n)) for n in (1.0, 2.0)] for _ in range(2))
    opt = metaopt.build(params, KINDS[kind])
    settings = {k: v for k, v in opt.base.defaults.items() if k != "decoupled_weight_decay"}
    plain = type(opt.base)(twins, **settings)
    for step in range(6):
        for (p, q), stepped in ((params, opt), (twins, plain)):
            if step == 4:
                stepped.state[p], stepped.state[q] = stepped.state[q], stepped.state[p]
            p.grad, q.grad = torch.full((3,), 1.0), torch.full((3,), -0.1 * step)
            stepped.step()
    assert all(map(torch.equal, params, twins))


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_may_be_turned_where_it_is(kind: str) -> None:
    # the same address and sizes, other strides
    start = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    base, _, settings = KINDS[kind].partition("(")
    p, plain = (torch.nn.Parameter(start.clone()) for _ in range(2))
    opt = metaopt.build([p], KINDS[kind])
    twin = metaopt.build([plain], f"{base}(fused=False, foreach=False, {settings}")
    for step in range(6):
        if step == 4:
            p.data, plain.data = p.data.t(), plain.data.t()
        gradient = torch.randn(5, 5, generator=torch.Generator().manual_seed(step))
        p.grad, plain.grad = gradient.clone(), gradient.clone()
        opt.step()
        twin.step()
    torch.testing.assert_close(p.detach(), plain.detach(), rtol=1e-5, atol=1e-6)


UNLIKE = {
    "class": torch.nn.Parameter(torch.ones(4, 6), requires_grad=False),
    "dtype": torch.ones(4, 6, dtype=torch.float64),
    "device": torch.ones(4, 6, device="meta"),
    "sparse": torch.ones(4, 6).to_sparse(),
    "sizes": torch.ones(4, 7),
    "strides": torch.ones(6, 4).t(),
    "gaps": torch.ones(4, 12)[:, ::2],
    "graph": torch.ones(4, 6, requires_grad=True),
}


@pytest.mark.parametrize("unlike", UNLIKE)
def test_a_tensor_with_another_property_is_not_taken_for_one_that_was_uniform(unlike: str) -> None:
    plain = [torch.zeros(4, 6) for _ in range(4)]
    uniform = UniformTensors(plain[:2], plain[2:])
    assert uniform.have_same(plain[2:], plain[:2])
    assert not uniform.have_same(plain[:1], plain[2:])
    for place in range(4):
        tensors = list(plain)
        tensors[place] = UNLIKE[unlike]
        assert not uniform.have_same(tensors[:2], tensors[2:])


@pytest.mark.parametrize("spec", ["clip_grad_norm(0.1) | adamw(lr=0.01) | lookahead(k=2)", "sgd(lr=0.1) | cautious"])
def test_without_torch_s_guards_updates_are_the_same(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for has_guards in (True, False):
        if not has_guards:
            monkeypatch.setattr(torch_internals, "_has_guards", lambda: False)
        model = small_model()
        opt = metaopt.build(model, spec)
        for step in range(6):
            fill_gradients(model, step)
            opt.step()
        ends.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *ends))


def test_a_gradient_may_become_sparse_late() -> None:
    p = torch.nn.Parameter(torch.ones(4, 2))
    opt = metaopt.build([p], "sgd(lr=0.1)")
    for sparse in (False, False, True):
        p.grad = torch.ones(4, 2).to_sparse(1) if sparse else torch.ones(4, 2)
        opt.step()
    assert torch.allclose(p, torch.full((4, 2), 0.7))


def test_weights_of_two_dtypes_in_one_block_do_not_share_memory() -> None:
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(4, 4, generator=generator).to(d) for d in (torch.float32, torch.bfloat16, torch.float32)]
    params = [torch.nn.Parameter(start.clone()) for start in starts]
    alone = [torch.nn.Parameter(start.clone()) for start in starts]
    spec = "adamw(lr=0.01) | cautious"
    opt, others = metaopt.build(params, spec), [metaopt.build([p], spec) for p in alone]
    for _ in range(4):
        for p, q in zip(params, alone, strict=True):
            p.grad = torch.randn(4, 4, generator=generator).to(p.dtype)
            q.grad = p.grad.clone()
        for each in (opt, *others):
            each.step()
    for p, q in zip(params, alone, strict=True):
        torch.testing.assert_close(p, q)


class Calls(TorchDispatchMode):
    """Counts what is called of torch."""

    number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("spec", "most"),
    [
        ("adamw", 2),  # the kernel, and one addition to all counts
        ("sgd(lr=0.1, momentum=0.9)", 1),
        ("adamw | lookahead(k=1)", 4),
        ("clip_grad_norm(1e6) | adamw | lookahead(k=5)", 10),
    ],
)
def test_the_calls_of_an_update_do_not_grow_with_the_number_of_tensors(spec: str, most: int) -> None:
    for number in (3, 30):
        params = [torch.nn.Parameter(torch.ones(4)) for _ in range(number)]
        opt = metaopt.build(params, spec)
        for p in params:
            p.grad = torch.ones(4)
        with Calls() as calls:
            for _ in range(3):
                opt.step()
            calls.number = 0
            opt.step()
        assert calls.number <= most, number


def test_parts_on_the_update_are_the_same_over_copies_that_the_kernel_moves() -> None:
    # without `fused` the weights are copied, moved and set back
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator) * 0.02) for _, s in shapes_of("tiny")]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    spec = "adamw(lr=0.01, weight_decay=0.1, {}) | update_floor | cautious | cautious_decay"
    opt, plain = (
        metaopt.build(tensors, spec.format(how))
        for tensors, how in ((params, "fused=True"), (twins, "foreach=False, fused=False"))
    )
    for _ in range(6):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        opt.step()
        plain.step()
    torch.testing.assert_close(params, twins, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_that_the_user_chose_is_left_with_a_warning_where_it_would_be_wrong(kind: str) -> None:
    start = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    p, plain = (torch.nn.Parameter(start.clone()) for _ in range(2))
    base, _, settings = KINDS[kind].partition("(")
    opt = metaopt.build([p], f"{base}(fused=True, {settings}")
    twin = metaopt.build([plain], f"{base}(fused=False, foreach=False, {settings}")
    gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).mT
    p.grad, plain.grad = gradient, gradient.contiguous()
    with pytest.warns(metaopt.MetaoptWarning, match=r"fused=True.*wrong elements"):
        opt.step()
    twin.step()
    torch.testing.assert_close(p.detach(), plain.detach(), rtol=1e-5, atol=1e-6)
    assert opt.param_groups[0]["fused"] is None


def test_state_that_only_the_base_has_of_a_frozen_parameter_costs_no_lists() -> None:
    """As a checkpoint of the bare base brings it to a stack with an average, and the parameter is frozen by then."""
    model = small_model()
    plain = torch.optim.AdamW(model.parameters(), lr=0.01)
    fill_gradients(model, 0)
    plain.step()
    opt = metaopt.build(model, "adamw(lr=0.01) | ema(0.9)")
    with pytest.warns(metaopt.MetaoptWarning, match="started fresh: ema"):
        opt.load_state_dict(plain.state_dict())
    first = next(model.parameters()).requires_grad_(False)
    first.grad = None

    def update(step: int) -> None:
        fill_gradients(model, step)
        first.grad = None
        opt.step()

    for step in range(1, 4):
        update(step)
    lists = dict(opt._run.fused_lists)
    update(4)
    assert lists and {key: each for key, each in opt._run.fused_lists.items() if lists.get(key) is each} == lists
    # its first gradient makes its average
    first.requires_grad_(True)
    fill_gradients(model, 5)
    opt.step()
    assert "ema.average" in opt.state[first]
