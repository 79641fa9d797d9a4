"""FSDP2 over layers that tensor parallelism has split along the same dimension: numbers are taken over all shards."""

import pytest
import torch
from clients.ranks import on_ranks
from clients.training import weights
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import metaopt

pytestmark = pytest.mark.slow

SPECS = (
    "clip_grad_norm(0.05) | adamw(lr=0.05) | lookahead(k=3)",
    "clip_grad_norm(0.05, norm_type=inf) | sgd(lr=0.05, momentum=0.9)",
    "adamw(lr=0.05) | update_floor(2.0) | radial_brake(0.3, 0.7) | cautious_decay(0.4)",
    "adamw(lr=0.05) | update_floor(2.0, rows=True) | trust_ratio(max_ratio=3.0)",
    "adaptive_grad_clip(0.01) | sgd(lr=0.05)",
    "sgd(lr=0.05) | clip_update_norm(0.01)",
    "gradient_noise(0.1) | sgd(lr=0.05)",
)


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))


def in_two_dimensions(model: nn.Sequential) -> nn.Sequential:
    """Return the model split over four ranks: by tensor parallelism, and each part by FSDP2."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


def train(model: nn.Module, opt: metaopt.Stack, steps: int) -> None:
    for step in range(steps):
        # the same rows on all ranks, so that the mean over ranks is the gradient of one process
        model(torch.randn(6, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        opt.step()
        opt.zero_grad()


@on_ranks(4)
def test_a_run_over_both_kinds_of_shards_is_the_run_of_one_process() -> None:
    for spec in SPECS:
        model, twin = in_two_dimensions(two_layers()), two_layers()
        # the first layer's rows are split twice, which torch marks by a kind of placement of its own
        placements = model[0].weight.placements
        assert not any(placement.is_replicate() for placement in placements)
        assert not all(placement.is_shard() for placement in placements)
        opt, plain = metaopt.build(model, spec), metaopt.build(twin, spec)
        train(model, opt, 7)
        train(twin, plain, 7)
        torch.testing.assert_close(weights(model), weights(twin), msg=lambda text, spec=spec: f"{spec}: {text}")
