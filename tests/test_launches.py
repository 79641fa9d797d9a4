"""Kernels that an update launches on an accelerator, counted without one: see `benchmarks.launches`."""

import pytest
import torch
from accelerated import take_for_accelerator

import metaopt
from benchmarks.launch_rules import launches_of
from benchmarks.launches import ALLOWED, SHAPES, by_hand, by_stack, count, default_specs
from metaopt import flat_memory
from metaopt.flat_memory import CHUNK, add_multiples_, dots, flat_room, memory_of, multiply_, sums

# parts that launch more than is allowed, at most so many at 10 tensors: docs/performance.md has the reasons
MORE_THAN_ALLOWED = {
    "adaptive_grad_clip | adamw": 20,
    "adamw | cautious": 20,
    "adamw | clip_update_norm": 17,
    "adamw | clip_update_rms": 18,
    "adamw | ema_nesterov": 18,
    "gradient_noise | adamw": 22,
    "adamw | hyperball": 40,
    "adamw | magma": 66,
    "adamw | mechanic": 81,
    "orthograd | adamw": 41,
    "adamw | radial_brake": 44,
    "adamw | schedule_free": 24,
    "skip_spikes(window=2) | adamw": 35,
    "adamw | trust_ratio": 26,
    "adamw | update_floor": 21,
    "adamw | update_floor(rows=True)": 27,
    "zclip(warmup=2) | adamw": 27,
    "sam(adaptive=True) | adamw": 21,
}
# parts on the update whose rules run over flat memory: as many for any number of tensors
BY_RULES = {
    "adamw | cautious_decay": 12,
    "adamw | clip_update_rms": 18,
    "adamw | cautious": 20,
    "adamw | update_floor": 21,
    "adamw | trust_ratio": 26,
    "adamw | radial_brake": 44,
}


def launched(operator, *args) -> tuple[int, int]:
    found = launches_of(operator, args, None)
    return found.get(13, 0), found.get(12, 0)


def on_device(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]


def test_a_multi_tensor_call_is_cut_as_torch_cuts_it() -> None:
    many, large = on_device(*[(4,)] * 1000), on_device((321 * 65536,))
    add = torch.ops.aten._foreach_add_.List
    assert launched(add, many, many) == (3, 16)  # 448 and 64 tensors fit
    assert launched(add, large, large) == (1, 2)  # 2,240 and 320 chunks
    assert launched(torch.ops.aten._foreach_add_.Scalar, many, 1.0) == (2, 10)
    assert launched(torch.ops.aten._foreach_norm.Scalar, many, 2) == (1 + 2 + 3, 1 + 10 + 3)
    assert launched(torch.ops.aten.stack.default, many) == (8, 8)


def test_what_torch_does_one_by_one_counts_one_by_one() -> None:
    wide, half = on_device((3, 4), (5,)), on_device((3, 4), (5,), dtype=torch.bfloat16)
    assert launched(torch.ops.aten._foreach_add_.List, wide, half) == (2, 2)
    assert launched(torch.ops.aten._foreach_copy_.default, wide, half) == (1, 1)
    assert launched(torch.ops.aten._foreach_mul_.List, wide, on_device((), ())) == (2, 2)
    assert launched(torch.ops.aten._foreach_mul_.Tensor, half, on_device(())[0]) == (2, 2)
    assert launched(torch.ops.aten.view.default, wide[0], [12]) == (0, 0)
    assert launched(torch.ops.aten.add_.Tensor, torch.ones(3), torch.ones(3)) == (0, 0)


def test_the_update_by_hand_and_the_stack_launch_what_is_known() -> None:
    assert count(by_hand, SHAPES[10]).launches == {13: 12, 12: 12}
    assert count(by_hand, SHAPES[148]).launches == {13: 13, 12: 32}
    assert count(by_stack("clip_grad_norm(1.0) | adamw | lookahead(k=1)"), SHAPES[10]).launches[13] == 14
    # the state of the base is cleared in three calls, however many tensors it has
    reset = count(by_stack("adamw | lookahead(k=2, pullback_momentum='reset')"), SHAPES[10])
    assert reset.launches[13] == 2 + 2 + 3


@pytest.mark.slow
def test_no_part_launches_much_more_than_the_update_by_hand() -> None:
    most = count(by_hand, SHAPES[10]).launches[13] + ALLOWED
    found = {spec: count(by_stack(spec), SHAPES[10]).launches[13] for spec in default_specs(torch.float32)}
    assert {s: n for s, n in found.items() if n > MORE_THAN_ALLOWED.get(s, most)} == {}


@pytest.mark.parametrize("tensors", [10, pytest.param(148, marks=pytest.mark.slow)])
def test_rules_launch_as_much_for_many_tensors_as_for_few(tensors: int) -> None:
    found = {spec: count(by_stack(spec), SHAPES[tensors]) for spec in BY_RULES}
    assert {spec: each.launches[13] for spec, each in found.items()} == BY_RULES
    assert not any(each.waits for each in found.values())


# ---- numbers over one memory, on a processor


def flat(*shapes: tuple[int, ...]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=generator) for shape in shapes]
    pieces = flat_room(given, torch.float32)
    torch._foreach_copy_(pieces, given)
    return given, pieces


@pytest.mark.parametrize("devices", [("cpu",), ()])
@pytest.mark.parametrize("is_flat", [True, False])
def test_numbers_of_pieces_of_one_memory_are_those_of_the_tensors(
    is_flat: bool, devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat_memory, "ADDING_SEGMENTS", devices)
    given, pieces = flat((3, 5), (), (CHUNK,), (0,), (2 * CHUNK + 1,))
    assert memory_of(given) is None and memory_of(pieces) is not None
    tensors = pieces if is_flat else given
    others = [t.flip(0) if t.dim() else t for t in given]
    torch.testing.assert_close(sums(tensors), [t.sum() for t in given])
    expected = [torch.dot(a.flatten(), b.flatten()) for a, b in zip(given, others, strict=True)]
    torch.testing.assert_close(dots(tensors, others), expected)


def test_the_pieces_of_a_memory_are_found_again_only_if_they_are_all_of_them() -> None:
    _, pieces = flat((3, 5), (7,))
    assert memory_of(pieces) is not None
    assert memory_of(pieces[::-1]) is None and memory_of(pieces[:1]) is None
    numbers = torch.tensor([2.0, 3.0])
    expected = [piece * number for piece, number in zip(pieces, numbers, strict=True)]
    multiply_(pieces, numbers)
    torch.testing.assert_close(pieces, expected)
    add_multiples_(pieces, [torch.ones(3, 5), torch.ones(7)], numbers)
    torch.testing.assert_close(pieces, [e + n for e, n in zip(expected, numbers, strict=True)])


def trained(spec: str, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(6, 5), (5,), (3, 4, 2), (), (CHUNK + 3,)]
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    opt = metaopt.build(params, spec)

    def closure() -> torch.Tensor:
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        return torch.zeros(())

    for _ in range(6):
        opt.step(closure)
    averages = [v for state in opt.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return [t.detach().double() for t in (*params, *averages)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_form_of_an_accelerator_computes_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [spec for spec in default_specs(dtype) if "plateau" not in spec]
    expected = {spec: trained(spec, dtype) for spec in specs}
    take_for_accelerator(monkeypatch)
    tolerance = {"rtol": 2e-4, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    others = []
    for spec in specs:
        pairs = zip(trained(spec, dtype), expected[spec], strict=True)
        others += [spec] * (not all(torch.allclose(a, b, equal_nan=True, **tolerance) for a, b in pairs))
    assert others == []
