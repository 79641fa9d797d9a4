"""The norm over many tensors is torch's, whether or not they have to be sorted by dtype first."""

import pytest
import torch

from metaopt.distributed.norms import total_norm


@pytest.mark.parametrize("p", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("dtypes", [[torch.float32] * 3, [torch.float64] * 3, [torch.float32, torch.float64]])
def test_the_norm_is_torch_s_to_the_last_bit(p, dtypes, device):
    kinds = [torch.float32 if device.type == "mps" else dtype for dtype in dtypes]
    tensors = [torch.randn(5, i + 1, device=device).to(kind) for i, kind in enumerate(kinds)]
    norm, expected = total_norm(tensors, p), torch.nn.utils.get_total_norm(tensors, p)
    assert torch.equal(norm, expected) and norm.dtype == expected.dtype


@pytest.mark.parametrize("dtypes", [[torch.float16] * 3, [torch.bfloat16] * 3, [torch.float32, torch.bfloat16]])
def test_the_norm_of_16_bits_is_worked_out_in_32(dtypes, device):
    tensors = [torch.full((100,), 3e4, device=device).to(dtype) for dtype in dtypes]
    norm = total_norm(tensors)
    exact = torch.linalg.vector_norm(torch.cat([t.double() for t in tensors]))
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("p", [1.0, 2.0, float("inf")])
def test_what_is_not_finite_is_not_hidden(bad, p, device):
    tensors = [torch.ones(4, device=device), torch.tensor([1.0, bad], device=device), torch.ones(2, device=device)]
    expected = torch.nn.utils.get_total_norm(tensors, p)
    torch.testing.assert_close(total_norm(tensors, p), expected, equal_nan=True)
    assert not expected.isfinite()


def test_no_tensors_have_no_norm():
    assert total_norm([]).item() == 0.0


@pytest.mark.parametrize("p", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_an_empty_tensor_adds_nothing_to_any_norm(p, dtype, device):
    if device.type == "mps" and dtype != torch.float32:
        pytest.skip("no such tensors there")
    full = torch.arange(4, device=device).to(dtype)
    empty = torch.empty(2, 0, device=device, dtype=dtype)
    assert torch.equal(total_norm([empty, full, empty], p), total_norm([full], p))
    assert total_norm([empty], p).item() == 0.0
    assert torch.equal(total_norm([empty.to(torch.float32), full], p), total_norm([full], p))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("shapes", [[(2048, 1024)], [(2048, 1024), (7,)], [(3,), (1 << 21,)]])
def test_the_norm_of_large_tensors_is_exact_to_the_last_digits(p, shapes):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    exact = torch.linalg.vector_norm(torch.cat([t.double().flatten() for t in tensors]), p)
    torch.testing.assert_close(total_norm(tensors, p).double(), exact, rtol=3e-6, atol=0.0)


def small_tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    """Return many small tensors of all kinds, and a few others."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (7,), (0,), (3, 4), (1000,), (16, 64), (2, 3, 4), (1025,)] * 60
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [*tensors, torch.randn(40, 6).t()[::2].to(dtype), torch.randn(64, 2048).to(dtype)]


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_norm_of_many_small_tensors_has_no_more_error_than_torch_s(p, dtype):
    tensors = small_tensors(dtype)
    if p == float("inf"):
        tensors = [t for t in tensors if t.numel()]
    exact = torch.linalg.vector_norm(torch.cat([t.double().flatten() for t in tensors]), p)
    norm, torchs = total_norm(tensors, p), torch.nn.utils.get_total_norm(tensors, p)
    assert norm.dtype == dtype
    assert norm.dim() == 0
    # in 64 bits the exact number has an error of its own
    rounding = torch.finfo(dtype).eps * exact * (1 if dtype == torch.float32 else 1000)
    assert (norm - exact).abs() <= max((torchs - exact).abs(), rounding)
    assert torch.equal(total_norm(tensors, p, uniform=True), norm)


@pytest.mark.parametrize("shape", [(16,), (4, 4)])
def test_the_calls_for_a_norm_do_not_grow_with_many_small_tensors(shape):
    tensors = [torch.full(shape, 1e-3) for _ in range(1000)]
    with torch.profiler.profile() as profile:
        norm = total_norm(tensors)
    assert sum(event.count for event in profile.key_averages() if "norm" in event.key) <= 4
    assert float(norm) == pytest.approx(16000**0.5 * 1e-3, rel=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_one_of_many_small_tensors_that_is_not_finite_is_not_hidden(bad, p):
    tensors = [torch.ones(4) for _ in range(100)]
    tensors[40][1] = bad
    torch.testing.assert_close(total_norm(tensors, p), torch.tensor(bad), equal_nan=True)


@pytest.mark.parametrize("cut", ["turned", "odd", "strided"])
def test_large_tensors_that_have_no_even_rows_are_left_to_torch(cut, device):
    whole = torch.randn(512, 514, device=device)
    tensor = {"turned": whole.t(), "odd": whole.flatten()[: (1 << 17) + 1], "strided": whole[:, ::2]}[cut]
    assert torch.equal(total_norm([tensor, whole[0]]), torch.nn.utils.get_total_norm([tensor, whole[0]]))
