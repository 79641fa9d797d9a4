"""FSDP2: a stack over DTensor parameters is the stack over whole ones, and what it keeps is sharded with them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from accelerated import take_for_accelerator
from clients.ranks import on_two_ranks
from clients.training import assert_same, batch, loss_of, share, small_model, train, weights
from torch import nn
from torch.distributed.fsdp import fully_shard

import metaopt
from metaopt.engine.views import blocks
from metaopt.measurements import OfBins

pytestmark = pytest.mark.slow

SPEC = "clip_grad_norm(0.5) | adamw(lr=0.05) | lookahead(k=3)"


def sharded(model: nn.Sequential) -> nn.Sequential:
    """Return the model with each layer sharded by itself, as FSDP2 is used."""
    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


def pair(spec: str) -> tuple[nn.Module, metaopt.Stack, nn.Module, metaopt.Stack]:
    """Return a sharded model and its stack, and the same unsharded."""
    model, twin = sharded(small_model()), small_model()
    return model, metaopt.build(model, spec, total_steps=20), twin, metaopt.build(twin, spec, total_steps=20)


def assert_sharded_as_unsharded(spec: str, steps: int) -> None:
    model, opt, twin, plain = pair(spec)
    train(model, opt, 0, steps)
    train(twin, plain, 0, steps)
    torch.testing.assert_close(weights(model), weights(twin), msg=lambda text: f"{spec}: {text}")


@on_two_ranks
def test_a_sharded_run_is_the_unsharded_run() -> None:
    for spec in (
        SPEC,
        "adamw(lr=0.05) | lookahead(k=3, pullback_momentum='pullback')",
        "adamw(lr=0.05) | lookahead(k=2, pullback_momentum='reset') | lookahead(k=4, label='outer')",
        "clip_grad_norm(0.5, norm_type=inf) | sgd(lr=0.05, momentum=0.9) | lookahead(k=3)",
        "clip_grad_norm(0.5, norm_type=1.0) | adagrad(lr=0.05)",
        "clip_grad_value(0.02) | rmsprop(lr=cosine(0.01)) | lookahead(k=2, alpha=linear(0.3, 0.9))",
    ):
        assert_sharded_as_unsharded(spec, 10)


@on_two_ranks
def test_every_other_wrapper_is_the_same_over_shards() -> None:
    for spec in (
        "accumulate(2) | adamw(lr=0.05) | ema(0.9)",
        "sam(rho=0.05) | clip_grad_norm(0.5) | sgd(lr=0.05)",
        "sam(rho=0.05, adaptive=True) | sgd(lr=0.05)",
        "adaptive_grad_clip(0.01) | sgd(lr=0.05)",
        "centralize | adamw(lr=0.05) | cautious",
        "skip_nonfinite(3) | l2(0.1) | decay(0.1) | adam(lr=0.05)",
        "adamw(lr=0.05) | outer(k=3, lr=0.7, momentum=0.9)",
        "partition({'matrix': sgd(lr=0.02, momentum=0.9) | lookahead(k=2), '*': adamw(lr=cosine(0.05))})",
    ):
        assert_sharded_as_unsharded(spec, 8)


@on_two_ranks
def test_every_part_on_the_update_is_the_same_over_shards() -> None:
    for spec in (
        "adamw(lr=0.05) | update_floor(2.0) | radial_brake(0.3, 0.7) | cautious_decay(0.4)",
        "adamw(lr=0.05) | update_floor(2.0, rows=True) | trust_ratio(max_ratio=3.0) | cautious",
        "sgd(lr=0.05, momentum=0.9) | hyperball | clip_update_rms(0.3)",
        "adam(lr=0.05) | clip_update_norm(0.1) | lookahead(k=2)",
    ):
        assert_sharded_as_unsharded(spec, 8)


@on_two_ranks
def test_rules_over_flat_memory_are_the_same_over_shards() -> None:
    # the last layer has fewer rows than there are ranks
    def trained(place: Callable[[nn.Sequential], nn.Module], spec: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1))
        placed = place(model)
        opt = metaopt.build(placed, spec)
        for step in range(4):
            loss = placed(torch.randn(6, 7, generator=torch.Generator().manual_seed(step))).square().mean()
            loss.backward()
            opt.step()
            opt.zero_grad()
        return weights(model)

    for spec in (
        "adamw(lr=0.05) | update_floor(2.0) | radial_brake(0.3, 0.7) | cautious_decay(0.4)",
        "adamw(lr=0.05) | trust_ratio(max_ratio=3.0) | cautious",
        "sgd(lr=0.05, momentum=0.9) | hyperball | clip_update_rms(0.3)",
        "partition({'2.bias': adamw(lr=0.05) | trust_ratio, '*': adamw(lr=0.05) | cautious})",
    ):
        expected = trained(lambda model: model, spec)
        with pytest.MonkeyPatch.context() as forced:
            take_for_accelerator(forced)
            torch.testing.assert_close(trained(sharded, spec), expected, msg=spec)


@on_two_ranks
def test_what_one_rank_alone_sees_is_not_finite_for_all() -> None:
    for bad in (float("nan"), float("inf")):
        model, opt, *_ = pair("skip_nonfinite(3) | sgd(lr=0.05)")
        train(model, opt, 0, 1)
        before = weights(model)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        if torch.distributed.get_rank() == 1:
            model[0].weight.grad.to_local().fill_(bad)
        opt.step()
        assert opt.skipped == "gradients that are not finite"
        assert opt.updates == 1
        assert_same(weights(model), before)


@on_two_ranks
def test_clipping_takes_the_norm_over_all_shards() -> None:
    for norm_type in (2.0, 1.0, float("inf")):
        model, opt, *_ = pair(f"clip_grad_norm(1e-3, norm_type={norm_type}) | sgd(lr=1.0)")
        before = weights(model)
        train(model, opt, 0, 1)
        moved = [a - b for a, b in zip(before, weights(model), strict=True)]
        length = torch.linalg.vector_norm(torch.cat([m.flatten() for m in moved]), norm_type)
        torch.testing.assert_close(length, torch.tensor(1e-3), rtol=1e-3, atol=0)


@on_two_ranks
def test_one_norm_goes_over_sharded_and_whole_parameters_together() -> None:
    model, twin = small_model(), small_model()
    fully_shard(model[0])
    spec = "clip_grad_norm(0.01) | sgd(lr=1.0)"
    opt, plain = metaopt.build(model, spec), metaopt.build(twin, spec)
    for m, o in ((model, opt), (twin, plain)):
        m(batch(0)).sum().backward()  # the same rows on both ranks: what is not sharded needs no reduction
        o.step()
    torch.testing.assert_close(weights(model), weights(twin))


@on_two_ranks
def test_averaged_shows_the_unsharded_average_and_training_goes_on_as_if_nothing_was_shown() -> None:
    for shard in (sharded, fully_shard):  # a root module with parameters of its own keeps what it gathered to evaluate
        model, twin = shard(small_model()), small_model()
        opt, plain = metaopt.build(model, SPEC), metaopt.build(twin, SPEC)
        for first, last in ((0, 4), (4, 5), (5, 8)):
            train(model, opt, first, last)
            train(twin, plain, first, last)
            with torch.no_grad():
                torch.testing.assert_close(model(batch(0)), twin(batch(0)))
                with opt.averaged(), plain.averaged():
                    torch.testing.assert_close(weights(model), weights(twin))
                    torch.testing.assert_close(model(batch(0)), twin(batch(0)))
                torch.testing.assert_close(model(batch(0)), twin(batch(0)))
        torch.testing.assert_close(weights(model), weights(twin))


@on_two_ranks
def test_parameters_that_a_client_replaces_by_their_shards_are_trained() -> None:
    # as Accelerate does under FSDP2: the stack is built first, its groups are given the shards afterwards
    for base in ("sgd(lr=0.05, momentum=0.9)", "adamw(lr=0.05)"):
        model, twin = small_model(), small_model()
        spec = f"clip_grad_norm(0.5) | {base} | lookahead(k=3)"
        opt, plain = metaopt.build(model, spec), metaopt.build(twin, spec)
        sharded(model)
        opt.param_groups[0]["params"] = list(model.parameters())
        train(model, opt, 0, 7)
        train(twin, plain, 0, 7)
        torch.testing.assert_close(weights(model), weights(twin))


@on_two_ranks
def test_the_state_is_sharded_as_its_parameter_is() -> None:
    model, opt, *_ = pair(SPEC)
    train(model, opt, 0, 1)
    for p in model.parameters():
        for key in ("exp_avg", "lookahead.slow"):
            assert opt.state[p][key].placements == p.placements
            assert opt.state[p][key].to_local().shape == p.to_local().shape


@on_two_ranks
def test_parts_on_gradients_and_updates_are_the_same_over_shards() -> None:
    for spec in (
        "mars(gamma=0.5) | adamw(lr=0.05)",
        "grokfast(alpha=0.8) | sgd(lr=0.05)",
        "orthograd | sgd(lr=0.05)",
        "gradient_noise(eta=0.1) | sgd(lr=0.05)",
        "adamw(lr=0.05) | magma",
        "zclip(z_thresh=0.3, warmup=2) | sgd(lr=0.05)",
        "adamw(lr=1.0) | mechanic(s_init=0.01)",
    ):
        assert_sharded_as_unsharded(spec, 8)


@on_two_ranks
def test_averages_over_shards_are_those_of_the_whole() -> None:
    for spec in (
        "sgd(lr=0.05, momentum=0.9) | schedule_free(momentum=0.9)",
        "adamw(lr=0.05) | gpa",
        "adamw(lr=0.05) | ema_nesterov(gamma=0.8)",
        "adamw(lr=0.05) | tail_average(start=2, every=2)",
        "adamw(lr=0.05) | lawa(k=2, n=3)",
        "adamw(lr=0.05) | ema(0.8)",
    ):
        model, opt, twin, plain = pair(spec)
        for first, last in ((0, 5), (5, 9)):
            train(model, opt, first, last)
            train(twin, plain, first, last)
            with opt.averaged(), plain.averaged():
                torch.testing.assert_close(weights(model), weights(twin), msg=lambda text, s=spec: f"{s}: {text}")
        torch.testing.assert_close(weights(model), weights(twin), msg=lambda text, s=spec: f"{s}: {text}")


MEASURED = "monitor(effective_lr=True, alignment=True, sign_agreement=True, moments=True, sharpness=2, histograms=True)"


@on_two_ranks
def test_what_is_measured_over_shards_is_that_of_the_whole_model() -> None:
    spec = f"clip_grad_norm(0.5) | adamw(lr=0.05) | {MEASURED}"
    model, twin = sharded(small_model()), small_model()
    found, expected = (metaopt.build(m, spec, log_every=1) for m in (model, twin))
    for step in range(5):
        for m, opt in ((model, found), (twin, expected)):

            def closure(m: nn.Module = m, opt: metaopt.Stack = opt, step: int = step) -> torch.Tensor:
                opt.zero_grad()
                loss = loss_of(m, share(batch(step), m))
                loss.backward()
                return loss

            opt.step(closure)
        numbers, others = found.metrics(), expected.metrics()
        assert numbers.keys() == others.keys() and len(numbers) > 40
        binned, whole_bins = (
            {t: b.values for t, b in opt.log._last_many.items() if isinstance(b, OfBins)} for opt in (found, expected)
        )
        for tag, counts in whole_bins.items():  # a number at the edge of a bin may be rounded over it
            assert binned[tag].sum() == counts.sum() and (binned[tag] - counts).abs().sum() <= 2, tag
        for tag, number in others.items():
            if tag != "train/loss":  # each rank has the loss of its share of the batch
                assert abs(numbers[tag] - number) <= 1e-3 * abs(number) + 1e-5, (tag, numbers[tag], number)


class Nowhere(metaopt.Logger):
    """A log that is not kept."""

    def open(self, *, step: int, tags: Iterable[str], spec: str, hparams: Any) -> None:
        pass

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        pass


@on_two_ranks
def test_a_log_of_one_rank_alone_does_not_leave_the_others_behind() -> None:
    first = torch.distributed.get_rank() == 0
    model = sharded(small_model())
    opt = metaopt.build(model, SPEC, log=Nowhere() if first else None)
    opt.updates = 47
    train(model, opt, 47, 50)
    assert opt.metrics()["train/grad_norm"] > 0
    model = sharded(small_model())
    opt = metaopt.build(model, SPEC)
    train(model, opt, 0, 1)
    if first:
        opt.metrics()
    opt.updates = 48
    train(model, opt, 48, 51)
    assert opt.updates == 51


@on_two_ranks
def test_ranks_of_uneven_shards_cut_their_blocks_alike() -> None:
    blocks.CPU_BLOCK = 8  # of a process of its own
    model, twin = (
        nn.Sequential(*(nn.Linear(3, 3) for _ in range(3))),
        nn.Sequential(*(nn.Linear(3, 3) for _ in range(3))),
    )
    for number, (p, q) in enumerate(zip(model.parameters(), twin.parameters(), strict=True)):
        p.data.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
        q.data.copy_(p.data)
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    spec = "adamw(lr=0.05) | update_floor(2.0) | trust_ratio"
    opt, plain = metaopt.build(model, spec), metaopt.build(twin, spec)
    for step in range(4):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(100 + step))
        for m, o in ((model, opt), (twin, plain)):
            o.zero_grad()
            m(x).square().mean().backward()
            o.step()
    torch.testing.assert_close(weights(model), weights(twin))
