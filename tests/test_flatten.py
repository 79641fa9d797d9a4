"""`flatten` hands convolutions to a base as matrices, and everybody else sees them as they are."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import metaopt

SPEC = "partition({'*.weight & matrix': muon(lr=0.02), '*.weight': flatten | muon(lr=0.02), '*': adamw(lr=0.01)})"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 2))


def step(opt: torch.optim.Optimizer, model: nn.Module, seed: int) -> None:
    opt.zero_grad()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    model(x).square().mean().backward()
    opt.step()


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().flatten(1).clone()) for p in model.parameters() if p.dim() == 4]


def test_convolutions_move_as_their_matrices_do_bit_for_bit() -> None:
    model = net()
    convolutions = [p for p in model.parameters() if p.dim() == 4]
    alone = matrices(model)
    opt = metaopt.build(convolutions, "flatten | muon(lr=0.02)")
    bare = torch.optim.Muon(alone, lr=0.02)
    for seed in range(5):
        opt.zero_grad()
        model(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        for p, matrix in zip(convolutions, alone, strict=True):
            matrix.grad = p.grad.flatten(1).clone()  # type: ignore[union-attr]
        opt.step()
        bare.step()
        for p, matrix in zip(convolutions, alone, strict=True):
            assert torch.equal(p.flatten(1), matrix)
            assert opt.state[p]["momentum_buffer"].shape == p.shape and len(opt.state) == 2


def test_weights_in_another_memory_order_move_too() -> None:
    plain, last = net(), net().to(memory_format=torch.channels_last)
    for model in (plain, last):
        opt = metaopt.build(model, SPEC)
        for seed in range(3):
            step(opt, model, seed)
    assert last[0].weight.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(plain.parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)  # Muon multiplies in bfloat16
    assert not torch.equal(last[0].weight, net()[0].weight)


@pytest.mark.parametrize("copied", ["state_dict", "deepcopy", "pickle"])
def test_a_copy_goes_on_bit_for_bit(copied: str) -> None:
    model = net()
    opt = metaopt.build(model, SPEC + " | lookahead(k=2)")
    for seed in range(3):
        step(opt, model, seed)
    if copied == "state_dict":
        other = net()
        other.load_state_dict(model.state_dict())
        again = metaopt.build(other, str(opt.spec))
        again.load_state_dict(copy.deepcopy(opt.state_dict()))
    else:
        both: Any = (model, opt)
        other, again = copy.deepcopy(both) if copied == "deepcopy" else pickle.loads(pickle.dumps(both))
    for seed in range(3, 6):
        step(opt, model, seed)
        step(again, other, seed)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_failed_step_leaves_groups_and_state_as_they_were() -> None:
    model = net()
    convolutions = [p for p in model.parameters() if p.dim() == 4]
    opt = metaopt.build(convolutions, "flatten | muon(lr=0.02)")
    step(opt, model, 0)
    opt.param_groups[0]["ns_steps"] = 200  # torch refuses so many
    with pytest.raises(ValueError, match=r"ns_steps|Number of steps"):
        step(opt, model, 1)
    assert all(a is b for a, b in zip(opt.param_groups[0]["params"], convolutions, strict=True))
    assert set(map(id, opt.state)) == set(map(id, convolutions))


def test_moments_of_other_bases_have_the_parameter_s_shape() -> None:
    model = net()
    opt = metaopt.build(model, "flatten | adamw(lr=0.01) | lookahead(k=2, pullback_momentum='pullback')", exact=True)
    bare = net()
    plain = metaopt.build(bare, "adamw(lr=0.01) | lookahead(k=2, pullback_momentum='pullback')", exact=True)
    for seed in range(4):
        step(opt, model, seed)
        step(plain, bare, seed)
    assert all(map(torch.equal, model.parameters(), bare.parameters()))  # an elementwise rule sees no shapes


def test_muon_without_it_says_the_way() -> None:
    with pytest.raises(metaopt.HyperparameterError, match=r"muon: .*2D.*Written before it, flatten hands it matrices"):
        metaopt.build(net(), "partition({'0.weight': muon(lr=0.02), '*': adamw})")
    with pytest.raises(metaopt.SpecError, match="flatten changes how SGD is made"):
        metaopt.wrap(torch.optim.SGD(net().parameters(), lr=0.1), "flatten")
    with pytest.raises(metaopt.SpecError, match="write it before muon"):
        metaopt.build(net(), "muon | flatten")
    with pytest.raises(metaopt.MetaoptError, match="flatten: LBFGS evaluates the loss itself"):
        metaopt.build(net(), "flatten | lbfgs")
