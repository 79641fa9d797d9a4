"""The norm over many tensors is torch's, whether or not they have to be sorted by dtype first."""

import pytest
import torch

from metaopt.norms import total_norm


@pytest.mark.parametrize("p", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("dtypes", [[torch.float32] * 3, [torch.bfloat16] * 3, [torch.float32, torch.float64]])
def test_the_norm_is_torch_s_to_the_last_bit(p, dtypes, device):
    kinds = [torch.float32 if device.type == "mps" else dtype for dtype in dtypes]
    tensors = [torch.randn(5, i + 1, device=device).to(kind) for i, kind in enumerate(kinds)]
    norm, expected = total_norm(tensors, p), torch.nn.utils.get_total_norm(tensors, p)
    assert torch.equal(norm, expected) and norm.dtype == expected.dtype


def test_no_tensors_have_no_norm():
    assert total_norm([]).item() == 0.0
