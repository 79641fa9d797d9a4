"""Data-parallel runs: DDP, ZeroRedundancyOptimizer, PostLocalSGDOptimizer."""

import contextlib
import copy
import functools
import math

import pytest
import torch
from clients.ranks import on_two_ranks
from clients.training import assert_same, small_model, train, weights
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import metaopt

SPEC = "clip_grad_norm(0.5) | adamw(lr=warmup(cosine(0.05), 3)) | lookahead(k=3)"
# each rank updates a share of the parameters, so no part may need the norm over all gradients
SHARED_OUT = "clip_grad_value(0.05) | adamw(lr=warmup(cosine(0.05), 3)) | lookahead(k=3, slow_dtype='float32')"


def stack_over(params: object, spec: str = SPEC) -> metaopt.Stack:
    return metaopt.build(params, spec, total_steps=12)


def zero(model: nn.Module, spec: str = SHARED_OUT) -> ZeroRedundancyOptimizer:
    # a factory in the place of an optimizer class: the stack is built over the rank's share
    factory = functools.partial(metaopt.build, spec=spec, total_steps=12)
    return ZeroRedundancyOptimizer(model.parameters(), optimizer_class=factory)


@pytest.mark.slow
@on_two_ranks
def test_the_noise_scale_over_ddp_ranks_is_that_of_one_process_that_accumulates_their_batches() -> None:
    rank, batches = torch.distributed.get_rank(), torch.Generator().manual_seed(5)
    watched, twin = small_model(), small_model()
    ddp = DistributedDataParallel(watched)
    # only one rank logs: whether the others do must not decide whether they take part
    opt = metaopt.build(watched, "monitor(replica_noise=2) | sgd(lr=0.05)", **({"log_every": 1} if rank == 0 else {}))
    plain = metaopt.build(twin, "accumulate(2) | monitor(noise_scale=True) | sgd(lr=0.05)", log_every=2)
    found, expected = [], []
    for update in range(1, 9):
        halves = [torch.randn(4, 3, generator=batches) for _ in range(2)]
        opt.zero_grad()
        own = [halves[rank]] if update != 4 else [halves[rank][:2], halves[rank][2:]]
        for piece in own:  # all but the last one stay on this rank
            with contextlib.nullcontext() if piece is own[-1] else ddp.no_sync():
                # a scaled loss is a factor, which is taken out
                (1024.0 / len(own) * ddp(piece).square().mean()).backward()
        if update == 8:
            watched[0].bias.grad.clamp_(max=0.0)  # no longer the mean of the ranks' gradients
        for p in watched.parameters():
            p.grad /= 1024.0
        opt.step()
        for half in halves:
            plain.zero_grad()
            twin(half).square().mean().backward()
            plain.step()
        if rank == 0 and update % 2 == 0:
            found.append(opt.metrics()["monitor/replica_noise"])
            expected.append(plain.metrics()["monitor/noise_scale"])
    if rank == 0:
        assert found[:3] == pytest.approx(expected[:3], rel=1e-4)
        assert math.isnan(found[3]) and expected[0] > 0.0


@on_two_ranks
def test_a_ddp_run_is_the_run_over_whole_batches() -> None:
    # other weights on the second rank: DDP sends it the first one's after the stack was built
    inner = small_model(seed=torch.distributed.get_rank())
    opt = stack_over(inner)
    model, twin = DistributedDataParallel(inner), small_model()
    plain = stack_over(twin)
    train(model, opt, 0, 7)
    train(twin, plain, 0, 7)
    torch.testing.assert_close(weights(inner), weights(twin))
    with opt.averaged(), plain.averaged():
        torch.testing.assert_close(weights(inner), weights(twin))


@on_two_ranks
def test_a_ddp_run_resumes_bit_for_bit() -> None:
    model, again = DistributedDataParallel(small_model()), DistributedDataParallel(small_model(seed=1))
    opt, resumed = stack_over(model), stack_over(again)
    train(model, opt, 0, 4)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for m, o in ((model, opt), (again, resumed)):
        train(m, o, 4, 10)
    assert_same(weights(again), weights(model))


@on_two_ranks
def test_zero_with_a_stack_inside_is_the_stack() -> None:
    model, twin = DistributedDataParallel(small_model()), DistributedDataParallel(small_model())
    opt, plain = zero(model), stack_over(twin, SHARED_OUT)
    train(model, opt, 0, 7)
    train(twin, plain, 0, 7)
    assert 0 < sum(len(g["params"]) for g in opt.optim.param_groups) < 4
    torch.testing.assert_close(weights(model), weights(twin))
    assert opt.param_groups[0]["lr"] == plain.param_groups[0]["lr"]


@on_two_ranks
def test_zero_with_a_stack_inside_resumes_bit_for_bit() -> None:
    model, again = DistributedDataParallel(small_model()), DistributedDataParallel(small_model(seed=1))
    opt, resumed = zero(model), zero(again)
    train(model, opt, 0, 4)
    opt.consolidate_state_dict()
    saved = [copy.deepcopy(opt.state_dict()) if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(saved)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved[0])
    assert resumed.optim.updates == 4
    for m, o in ((model, opt), (again, resumed)):
        train(m, o, 4, 10)
    assert_same(weights(again), weights(model))


@on_two_ranks
def test_zero_refuses_a_norm_that_each_rank_would_take_of_its_share() -> None:
    model = DistributedDataParallel(small_model())
    before = weights(model)
    with pytest.raises(metaopt.StepError, match=r"clip_grad_norm needs the norm over all.*clip_grad_norm_.*FSDP2"):
        train(model, zero(model, SPEC), 0, 1)
    assert_same(weights(model), before)


@on_two_ranks
def test_a_stack_around_zero_is_refused() -> None:
    sharing = ZeroRedundancyOptimizer(small_model().parameters(), optimizer_class=torch.optim.AdamW, lr=0.05)
    with pytest.raises(metaopt.SpecError, match=r"keeps AdamW in \.optim.*Put the stack inside"):
        metaopt.wrap(sharing, "lookahead(k=3)")


@on_two_ranks
def test_post_local_sgd_averages_the_weights_of_stacks() -> None:
    # each rank goes its own way, with its own data, and all meet every two updates
    inner = small_model()
    stack = stack_over(inner)
    opt = PostLocalSGDOptimizer(stack, PeriodicModelAverager(period=2, warmup_steps=0))
    for step in range(4):
        train(inner, opt, 10 * torch.distributed.get_rank() + step, 10 * torch.distributed.get_rank() + step + 1)
        both = [None, None]
        torch.distributed.all_gather_object(both, weights(inner))
        met = all(torch.allclose(a, b) for a, b in zip(*both, strict=True))
        assert met == (step % 2 == 0)
    assert stack.updates == 4
    saved = copy.deepcopy(opt.state_dict())
    assert saved["step"] == 4
    opt.load_state_dict(saved)
    assert stack.updates == 4


def test_a_flat_share_in_the_place_of_the_parameters_is_refused() -> None:
    # what DeepSpeed's ZeRO does to an optimizer that it is told to take untested
    model = small_model()
    opt = stack_over(model)
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    flat.grad = torch.ones_like(flat)
    opt.param_groups[0]["params"] = [flat]
    before = flat.detach().clone()
    with pytest.raises(metaopt.StepError, match=r"holds 1 now.*DeepSpeed's ZeRO.*FSDP2"):
        opt.step()
    assert_same([flat.detach()], [before])
    assert opt.updates == 0


class SharedMean(metaopt.Wrapper):
    """g <- the mean of g over the processes."""

    def on_gradients(self, groups: metaopt.Groups) -> None:
        for group in groups:
            torch._foreach_copy_(group.grads, group.mean_over_replicas(group.grads))


@on_two_ranks
def test_a_wrapper_takes_means_over_the_processes() -> None:
    rank = torch.distributed.get_rank()
    p = torch.nn.Parameter(torch.zeros(3))
    opt = metaopt.wrap(torch.optim.SGD([p], lr=1.0), [SharedMean()])
    p.grad = torch.full((3,), 1.0 + rank)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), -1.5))


def test_without_a_process_group_a_mean_over_processes_is_the_tensor() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    opt = metaopt.wrap(torch.optim.SGD([p], lr=1.0), [SharedMean()])
    p.grad = torch.ones(3)
    opt.step()
    torch.testing.assert_close(p.detach(), -torch.ones(3))
