"""Replicas that train on their own and meet every k updates: local SGD, DiLoCo and Streaming DiLoCo."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import reference_replicas as reference
import torch
from clients.ranks import on_ranks, on_two_ranks
from clients.training import assert_same, batch, loss_of, small_model
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import metaopt

pytestmark = pytest.mark.slow

SHAPES = ((6,), (3, 4), (), (5, 2))
STEPS = 200
INNER = "sgd(lr=0.02, momentum=0.9)"
DILOCO = "outer(k={k}, lr=0.7, momentum={momentum}, across='replicas')"


def starts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def pull(worker: int, step: int, weights: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """Return gradients that differ between workers; some parameters have none at some steps, or not before the 40th."""
    generator = torch.Generator().manual_seed(1000 * worker + step)
    found: list[torch.Tensor | None] = []
    for i, w in enumerate(weights):
        gradient = (w - worker - i) * (1 + worker) / 3 + torch.randn(w.shape, generator=generator, dtype=w.dtype)
        absent = (worker + i + step) % 5 == 0 or (i == 2 and worker == 1 and step < 40)
        found.append(None if absent else gradient)
    return found


def even(worker: int, step: int, weights: list[torch.Tensor]) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1000 * worker + step)
    return [w - worker + torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]


def trained(opt: metaopt.Stack, first: int, last: int, gradients: reference.Gradients = pull) -> list[torch.Tensor]:
    """Make the steps `first` to `last` of this rank; return the weights, all in one tensor, after each."""
    params = [p for group in opt.param_groups for p in group["params"]]
    history = []
    for step in range(first, last + 1):
        given = gradients(distributed.get_rank(), step, [p.detach() for p in params])
        for p, gradient in zip(params, given, strict=True):
            p.grad = gradient
        opt.step()
        history.append(flat(params))
    return history


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors]).clone()


def stack(spec: str, values: list[torch.Tensor] | None = None, **how: object) -> metaopt.Stack:
    return metaopt.build([nn.Parameter(w.clone()) for w in values or starts()], spec, **how)


def assert_simulated(
    part: str, rule: reference.Rule, steps: int = STEPS, gradients: reference.Gradients = pull
) -> None:
    rank, workers = distributed.get_rank(), distributed.get_world_size()
    simulation = reference.simulated(starts(), workers, steps, gradients, rule, lr=0.02, momentum=0.9)
    found = trained(stack(f"{INNER} | {part}"), 1, steps, gradients)
    for step, (own, expected) in enumerate(zip(found, simulation, strict=True), 1):
        difference = (own - flat(expected[rank])).abs().max()
        assert difference < 1e-12, f"{part}: {difference} at step {step}"


def everywhere(tensor: torch.Tensor) -> list[torch.Tensor]:
    told = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(told, tensor)
    return told


@dataclass
class Traffic:
    collectives: list[str] = field(default_factory=list)
    bytes: int = 0


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Count all collectives of the process, whoever calls them, and the bytes that it gives to them."""
    traffic = Traffic()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        yield traffic
    for event in profile.events():
        if event.name.startswith("c10d::"):
            traffic.collectives.append(event.name.removeprefix("c10d::"))
    for event in profile.events():
        if event.name == "gloo:all_reduce":
            traffic.bytes += sum(8 * int(torch.Size(shape).numel()) for shape in event.input_shapes)


@on_ranks(3)
def test_diloco_of_three_is_its_simulation() -> None:
    for k in (1, 4, 30):
        for momentum in (0.0, 0.9):
            assert_simulated(DILOCO.format(k=k, momentum=momentum), reference.Rule(k, momentum=momentum))


@on_two_ranks
def test_diloco_of_two_is_its_simulation() -> None:
    for k in (1, 4, 30):
        for momentum in (0.0, 0.9):
            assert_simulated(DILOCO.format(k=k, momentum=momentum), reference.Rule(k, momentum=momentum))


@on_two_ranks
def test_local_sgd_is_its_simulation() -> None:
    for k, alpha in ((4, 1.0), (30, 1.0), (4, 0.5)):
        part = f"lookahead(k={k}, alpha={alpha}, across='replicas')"
        assert_simulated(part, reference.Rule(k, alpha=alpha))


@on_two_ranks
def test_one_update_between_steps_is_data_parallel_sgd() -> None:
    opt = stack("sgd(lr=0.1) | lookahead(k=1, alpha=1.0, across='replicas')")
    found = trained(opt, 1, 20, even)
    whole = starts()
    for step in range(1, 21):
        gradients = [even(worker, step, whole) for worker in range(2)]
        whole = [w - 0.1 * (a + b) / 2 for w, a, b in zip(whole, *gradients, strict=True)]
        torch.testing.assert_close(found[step - 1], flat(whole), rtol=0, atol=1e-13)


@on_ranks(3)
def test_replicas_are_equal_bit_for_bit_after_each_outer_step() -> None:
    opt = stack(f"adamw(lr=0.01) | {DILOCO.format(k=4, momentum=0.9)}", [w.float() for w in starts()])
    for first in range(1, 40, 4):
        *_, before, after = trained(opt, first, first + 3)
        assert any(not torch.equal(other, before) for other in everywhere(before))
        assert_same(everywhere(after), [after] * 3)


@on_two_ranks
def test_one_all_reduce_for_each_outer_step_and_none_between() -> None:
    opt = stack(f"{INNER} | {DILOCO.format(k=30, momentum=0.9)}")
    opt.join_replicas()
    with counted() as traffic:
        trained(opt, 1, 120)
    assert traffic.collectives == ["allreduce_"] * 4
    assert traffic.bytes == 4 * 8 * sum(w.numel() for w in starts())


@on_two_ranks
def test_all_groups_are_sent_together() -> None:
    params = [nn.Parameter(w) for w in starts()]
    opt = metaopt.build([{"params": [p]} for p in params], f"{INNER} | {DILOCO.format(k=2, momentum=0.9)}")
    opt.join_replicas()
    with counted() as traffic:
        trained(opt, 1, 4)
    assert traffic.collectives == ["allreduce_"] * 2


@on_two_ranks
def test_many_weights_are_sent_in_buckets() -> None:
    from metaopt.distributed import replicas

    expected = trained(stack(f"{INNER} | {DILOCO.format(k=4, momentum=0.9)}"), 1, 20)
    before, replicas.BUCKET = replicas.BUCKET, 8 * 7
    try:
        opt = stack(f"{INNER} | {DILOCO.format(k=4, momentum=0.9)}")
        opt.join_replicas()
        with counted() as traffic:
            found = trained(opt, 1, 20)
    finally:
        replicas.BUCKET = before
    # 6 | 4 of 12 | 4 of 12 | 4 of 12 and 1 | 6 of 10 | 4 of 10, by whole rows
    assert traffic.collectives == ["allreduce_"] * 5 * 6
    assert_same(found, expected)


@on_two_ranks
def test_a_replica_that_skips_an_update_takes_part_with_what_it_has() -> None:
    def without(worker: int, step: int, weights: list[torch.Tensor]) -> list[torch.Tensor | None]:
        # no gradient at all, also at outer steps and at the last
        skips = (worker == 0 and step in (3, 8, 9)) or (worker == 1 and step in (1, 2, 3, 4, 40))
        return [None] * len(weights) if skips else even(worker, step, weights)

    assert_simulated(DILOCO.format(k=4, momentum=0.9), reference.Rule(4), 40, without)


@on_two_ranks
def test_a_gradient_that_is_not_finite_on_one_replica_leaves_the_others_alone() -> None:
    def broken(worker: int, step: int, weights: list[torch.Tensor]) -> list[torch.Tensor | None]:
        found = even(worker, step, weights)
        if worker == 1 and step in (1, 6, 12):
            found[0] = found[0] * float("nan")
        return found

    def without(worker: int, step: int, weights: list[torch.Tensor]) -> list[torch.Tensor | None]:
        return [None] * len(weights) if worker == 1 and step in (1, 6, 12) else even(worker, step, weights)

    spec = f"skip_nonfinite(5) | {INNER} | {DILOCO.format(k=4, momentum=0.9)}"
    assert_same(trained(stack(spec), 1, 12, broken), trained(stack(spec), 1, 12, without))


@on_two_ranks
def test_the_period_counts_updates_of_several_steps_and_a_flush_ends_one() -> None:
    opt = stack(f"accumulate(3) | {INNER} | lookahead(k=2, alpha=1.0, across='replicas')")
    equal = []
    for step in range(1, 12):
        trained(opt, step, step, even)
        if step == 7:
            opt.flush()  # the third update is that of one step
        equal.append(torch.equal(*everywhere(flat(opt.param_groups[0]["params"]))))
    # between two updates nothing moves
    assert [step for step, met in enumerate(equal, 1) if met] == [1, 2, 6, 10, 11]


@on_two_ranks
def test_replicas_that_begin_with_other_weights_take_those_of_the_first() -> None:
    rank = distributed.get_rank()
    opt = stack(f"{INNER} | {DILOCO.format(k=4, momentum=0.9)}", [w + rank for w in starts()])
    trained(opt, 1, 1, even)
    assert (opt.skipped, opt.updates) == (("took the weights of the other replicas", 0) if rank else (None, 1))
    again = stack(f"{INNER} | {DILOCO.format(k=4, momentum=0.9)}", [w + rank for w in starts()])
    assert again.join_replicas() == bool(rank)
    assert_same(again.param_groups[0]["params"], [nn.Parameter(w) for w in starts()])
    assert not again.join_replicas()


@on_two_ranks
def test_replicas_of_different_stacks_are_refused_on_all_of_them() -> None:
    rank = distributed.get_rank()
    for other, what in (
        (stack(f"{INNER} | outer(k={4 + rank}, across='replicas')"), "settings of the exchange"),
        (stack(f"{INNER} | outer(k=4, across='replicas')", starts()[rank:]), "parameters"),
    ):
        with pytest.raises(metaopt.StepError, match=f"replicas 0 and 1 have different {what}"):
            trained(other, 1, 1, even)


@on_two_ranks
def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    for part in (
        DILOCO.format(k=4, momentum=0.9),
        "outer(k=6, across='replicas', fragments=3, delay=2, blend=0.25)",
        "lookahead(k=3, across='replicas', pullback_momentum='pullback')",
        "lookahead(k=3, across='replicas', pullback_momentum='reset')",
    ):
        opt = stack(f"{INNER} | {part}")
        trained(opt, 1, 9)
        again = stack(f"{INNER} | {part}", [p.detach() for p in opt.param_groups[0]["params"]])
        again.load_state_dict(copy.deepcopy(opt.state_dict()))
        assert_same(trained(again, 10, 30), trained(opt, 10, 30))


@on_ranks(3)
def test_a_replica_that_joins_late_starts_from_the_outer_weights() -> None:
    rank = distributed.get_rank()
    two = distributed.new_group([0, 1])
    spec = f"adamw(lr=linear(0.01, 0.02)) | {DILOCO.format(k=4, momentum=0.9)} | ema(0.9)"
    saved = None
    if rank < 2:
        opt = stack(spec, total_steps=100, replicas=two)
        trained(opt, 1, 10)
        saved = copy.deepcopy(opt.state_dict()), [p.detach() for p in opt.param_groups[0]["params"]]

    def slow(of: metaopt.Stack) -> torch.Tensor:
        return flat([of.state[p]["outer.slow"] for p in of.param_groups[0]["params"]])

    # an elastic restart: the third has no checkpoint
    again = stack(spec, None if saved is None else saved[1], total_steps=100)
    if saved is not None:
        again.load_state_dict(saved[0])
    before = None if saved is None else slow(again)
    assert again.join_replicas() == (rank == 2)
    assert again.updates == 10
    told = everywhere(slow(again))
    assert_same(told, [told[0]] * 3)
    if rank == 2:
        assert_same([flat(again.param_groups[0]["params"])], [told[0]])
        assert not any("exp_avg" in s for s in again.state.values())
    else:
        assert_same([before], [told[0]])
    after = trained(again, 11, 12)[-1]
    assert_same(everywhere(after), [after] * 3)
    assert again.param_groups[0]["lr"] == pytest.approx(0.01 + 0.01 * 12 / 100)


@on_ranks(4)
def test_shards_are_averaged_with_their_peers_only() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    replica = mesh["replica"].get_local_rank()
    part = DILOCO.format(k=3, momentum=0.9)
    model, twin = small_model(), small_model()
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    opt = metaopt.build(model, f"adamw(lr=0.05) | {part}", replicas=mesh["replica"])
    plain = metaopt.build(twin, f"adamw(lr=0.05) | {part}", replicas=mesh["replica"].get_group())
    for step in range(7):
        rows = batch(10 * replica + step)
        half = rows.chunk(2)[mesh["shard"].get_local_rank()]
        for m, o, own in ((model, opt, half), (twin, plain, rows)):
            o.zero_grad()
            loss_of(m, own).backward()
            o.step()
        if step % 3 == 2:
            torch.testing.assert_close([p.full_tensor() for p in model.parameters()], list(twin.parameters()))
            told = everywhere(flat(list(twin.parameters())))
            assert_same(told, [told[0]] * 4)


@on_two_ranks
def test_a_mean_over_other_shards_is_refused() -> None:
    model = fully_shard(small_model())
    opt = metaopt.build(model, "sgd(lr=0.1) | outer(k=2, across='replicas')")
    loss_of(model, batch(0)).backward()
    with pytest.raises(metaopt.StepError, match=r"would mix different shards.*replicas=mesh"):
        opt.step()


@on_ranks(3)
def test_a_rank_outside_the_group_is_refused() -> None:
    two = distributed.new_group([0, 1])
    if distributed.get_rank() == 2:
        with pytest.raises(metaopt.SpecError, match="rank 2 is not in this group"):
            stack(f"{INNER} | {DILOCO.format(k=4, momentum=0.9)}", replicas=two)
    with pytest.raises(metaopt.SpecError, match="must be a process group, a device mesh of one dimension or None"):
        stack(f"{INNER} | {DILOCO.format(k=4, momentum=0.9)}", replicas="all")


@on_two_ranks
def test_ways_are_sent_in_16_bits_on_request() -> None:
    rule = reference.Rule(4, rounded=torch.bfloat16)
    assert_simulated("outer(k=4, lr=0.7, momentum=0.9, across='replicas', compress='bfloat16')", rule, 40)
    opt = stack(f"{INNER} | outer(k=4, across='replicas', compress='bfloat16')")
    trained(opt, 1, 3)
    (after,) = trained(opt, 4, 4)
    assert_same(everywhere(after), [after] * 2)


@on_ranks(3)
def test_streaming_diloco_is_its_simulation() -> None:
    # 6, 12, 1 and 10 elements
    two, three = ((0, 1), (2, 3)), ((0,), (1, 2), (3,))
    for k, fragments, delay, blend in (
        (4, two, 0, 0.5),
        (30, three, 0, 0.5),
        (4, two, 1, 0.5),
        (30, three, 5, 0.25),
        (30, ((0, 1, 2, 3),), 29, 0.0),
    ):
        part = f"outer(k={k}, lr=0.7, momentum=0.9, across='replicas', fragments={len(fragments)}, delay={delay}"
        part += f", blend={blend})" if delay else ")"
        assert_simulated(part, reference.Rule(k, fragments=fragments, delay=delay, blend=blend))


@on_two_ranks
def test_fragments_divide_the_peak_of_the_traffic() -> None:
    values = [torch.zeros(50, dtype=torch.float64) for _ in range(8)]
    opt = stack(f"{INNER} | outer(k=8, across='replicas', fragments=4)", values)
    opt.join_replicas()
    sent = []
    for step in range(1, 17):
        with counted() as traffic:
            trained(opt, step, step, even)
        sent.append(traffic.bytes)
    assert sent == [0, 8 * 100] * 8


@on_two_ranks
def test_a_part_of_several_has_its_own_outer_step() -> None:
    model = small_model(distributed.get_rank())
    spec = "partition({'*.weight': sgd(lr=0.05, momentum=0.9) | outer(k=2, across='replicas'), '*': adamw(lr=0.05)})"
    opt = metaopt.build(model, spec)
    for step in range(4):
        opt.zero_grad()
        loss_of(model, batch(step + 10 * distributed.get_rank())).backward()
        opt.step()
    shared = everywhere(flat([model[0].weight, model[2].weight]))
    own = everywhere(flat([model[0].bias, model[2].bias]))
    assert torch.equal(*shared)
    assert not torch.equal(*own)


def test_one_process_is_its_own_replica() -> None:
    for part in ("outer(k=3, lr=0.7, momentum=0.9{})", "lookahead(k=3{})"):
        alone, plain = (stack(f"{INNER} | {part.format(how)}") for how in (", across='replicas'", ""))
        for step in range(1, 20):
            for opt in (alone, plain):
                params = opt.param_groups[0]["params"]
                for p, gradient in zip(params, even(0, step, [p.detach() for p in params]), strict=True):
                    p.grad = gradient
                opt.step()
        torch.testing.assert_close(alone.param_groups[0]["params"], plain.param_groups[0]["params"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("outer(k=4, fragments=2)", "outer: fragments needs across='replicas'"),
        ("lookahead(k=4, compress='bfloat16')", "lookahead: compress needs across='replicas'"),
        ("outer(k=4, across='replicas', fragments=5)", "fragments must be at most 4 with k=4, got 5"),
        ("outer(k=4, across='replicas', delay=4)", "delay must be at most 3 with k=4, got 4"),
        ("outer(k=4, across='replicas', blend=0.1)", "blend needs a delay of 1 or more"),
        ("outer(k=4, across='nodes')", "across must be one of None, 'replicas'"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(part: str, message: str) -> None:
    with pytest.raises(metaopt.MetaoptError, match=message):
        stack(f"{INNER} | {part}")


def test_the_steps_of_all_groups_are_together() -> None:
    params = [nn.Parameter(w) for w in starts()]
    groups = [{"params": params[:2]}, {"params": params[2:], "outer.k": 3}]
    opt = metaopt.build(groups, f"{INNER} | outer(k=4, across='replicas')")
    with pytest.raises(metaopt.MetaoptError, match=r"outer\.k differs between groups"):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()


def test_a_group_needs_torch_distributed() -> None:
    with pytest.raises(metaopt.SpecError, match="init_process_group"):
        stack(f"{INNER} | outer(k=4, across='replicas')", replicas=object())
