"""`accumulate`: the last window of an epoch, which is not complete, and steps that count differently."""

import copy

import numpy
import pytest
import pytorch_optimizer
import torch

import metaopt

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def models(n: int = 2) -> list[torch.nn.Module]:
    first = torch.nn.Linear(3, 2, dtype=torch.float64)
    return [first, *(copy.deepcopy(first) for _ in range(n - 1))]


def tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def assert_same(model: torch.nn.Module, twin: torch.nn.Module) -> None:
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, **CLOSE)


BEHIND = "clip_grad_norm(0.3) | adamw(lr=0.1) | lookahead(k=2)"


@pytest.mark.parametrize("before", ["", "clip_grad_norm(1e9, label='first') | ", "skip_nonfinite(3) | "])
def test_flush_makes_the_update_of_the_batches_that_are_left_at_the_end_of_an_epoch(before: str) -> None:
    model, twin = models()
    opt = metaopt.build(model, f"{before}accumulate(4) | {BEHIND}", log_every=1)
    plain = metaopt.build(twin, BEHIND)
    for epoch in range(2):
        batches = [tokens(5, 10 * epoch + i) for i in range(10)]
        for batch in batches:
            loss_of(model, batch).backward()
            opt.step()
        assert opt.flush()
        for window in (batches[:4], batches[4:8], batches[8:]):
            plain.zero_grad()
            torch.stack([loss_of(twin, batch) for batch in window]).mean().backward()
            plain.step()
        assert opt.updates == plain.updates == 3 * (epoch + 1)
        assert opt.skipped is None
        assert_same(model, twin)
    assert all(p.grad is None for p in model.parameters())


def test_flush_with_nothing_gathered_makes_no_update() -> None:
    model, _ = models()
    opt = metaopt.build(model, "accumulate(2) | sgd(lr=0.1)")
    assert not opt.flush()
    for step in range(2):
        loss_of(model, tokens(2, step)).backward()
        opt.step()
    before = model.weight.detach().clone()
    assert not opt.flush()
    assert opt.skipped == "nothing accumulated"
    assert opt.updates == 1
    assert torch.equal(model.weight, before)


def test_a_loop_may_flush_whatever_its_stack_is() -> None:
    model, _ = models()
    opt = metaopt.build(model, "sgd(lr=0.1)")
    loss_of(model, tokens(2, 0)).backward()
    assert not opt.flush()
    assert opt.updates == 0
    assert model.weight.grad is not None


def test_gradients_that_no_step_has_seen_count_in_a_flush() -> None:
    model, twin = models()
    opt, plain = metaopt.build(model, "accumulate(4) | sgd(lr=0.1)"), metaopt.build(twin, "sgd(lr=0.1)")
    loss_of(model, tokens(2, 0)).backward()
    opt.step()
    loss_of(model, tokens(2, 1)).backward()
    opt.flush()
    torch.stack([loss_of(twin, tokens(2, i)) for i in range(2)]).mean().backward()
    plain.step()
    assert_same(model, twin)


def test_flush_goes_around_sam_which_wants_a_closure() -> None:
    model, _ = models()
    opt = metaopt.build(model, "sam | accumulate(4) | sgd(lr=0.1)")

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = loss_of(model, tokens(2, 0))
        loss.backward()
        return loss

    opt.step(closure)
    before = model.weight.detach().clone()
    assert opt.flush()
    assert not torch.equal(model.weight, before)


def test_flush_calls_torch_s_step_hooks_and_tells_its_schedulers() -> None:
    model, _ = models()
    opt = metaopt.build(model, "accumulate(4) | sgd(lr=0.1)")
    seen = []
    opt.register_step_post_hook(lambda *_: seen.append(opt.updates))
    loss_of(model, tokens(2, 0)).backward()
    opt.step()
    opt.flush()
    assert seen == [0, 1]


@pytest.mark.parametrize("kind", [int, float, numpy.int64, torch.tensor])
def test_weighed_steps_make_the_update_of_all_their_tokens(kind) -> None:
    model, twin = models()
    opt, plain = metaopt.build(model, f"accumulate(2) | {BEHIND}"), metaopt.build(twin, BEHIND)
    for window in range(3):
        batches = [tokens(30, 2 * window), tokens(10, 2 * window + 1)]
        for batch in batches:
            loss_of(model, batch).backward()
            opt.weigh(kind(len(batch)))
            opt.step()
        plain.zero_grad()
        loss_of(twin, torch.cat(batches)).backward()
        plain.step()
        assert_same(model, twin)


def test_a_weight_holds_for_one_step_and_an_incomplete_window_is_divided_by_its_tokens() -> None:
    model, twin = models()
    opt, plain = metaopt.build(model, "accumulate(8) | sgd(lr=0.1)"), metaopt.build(twin, "sgd(lr=0.1)")
    for count in (3, 1, 2):
        loss_of(model, tokens(count, count)).backward()
        if count != 1:
            opt.weigh(count)
        opt.step()
    opt.flush()
    loss_of(twin, torch.cat([tokens(count, count) for count in (3, 1, 2)])).backward()
    plain.step()
    assert_same(model, twin)


def test_weights_of_a_window_that_is_not_complete_are_in_the_checkpoint() -> None:
    model, twin, again = models(3)
    batches = [tokens(count, count) for count in (5, 1, 2, 7)]

    def train(model: torch.nn.Module, opt: metaopt.Stack, part: list[torch.Tensor]) -> None:
        for batch in part:
            loss_of(model, batch).backward()
            opt.weigh(len(batch))
            opt.step()

    opt, whole = (metaopt.build(m, "accumulate(4) | sgd(lr=0.1)") for m in (model, twin))
    train(twin, whole, batches)
    train(model, opt, batches[:2])
    resumed = metaopt.build(again, "accumulate(4) | sgd(lr=0.1)")
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(again, resumed, batches[2:])
    assert torch.equal(again.weight, twin.weight)


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf"), "3", True, torch.ones(2), None])
def test_a_weight_that_is_not_a_positive_number_is_refused(weight) -> None:
    opt = metaopt.build(models()[0], "accumulate(2) | sgd(lr=0.1)")
    with pytest.raises(metaopt.StepError, match=r"weigh\(\): the weight must be"):
        opt.weigh(weight)


def test_a_weight_changes_nothing_in_a_stack_that_makes_each_step_an_update() -> None:
    model, twin = models()
    opt, plain = metaopt.build(model, "clip_grad_norm(1.0) | sgd(lr=0.1)"), metaopt.build(twin, "sgd(lr=0.1)")
    opt.weigh(7)
    for m, o in ((model, opt), (twin, plain)):
        loss_of(m, tokens(2, 0)).backward()
        o.step()
    assert_same(model, twin)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_base_that_differentiates_through_gradients_is_told_of_the_part_that_replaces_them() -> None:
    model, _ = models()
    base = pytorch_optimizer.AdaHessian(model.parameters(), lr=0.1)
    opt = metaopt.wrap(base, "accumulate(1)")
    loss_of(model, tokens(2, 0)).backward(create_graph=True)
    with pytest.raises(metaopt.StepError, match="AdaHessian differentiates through the gradients, and accumulate"):
        opt.step()


def test_what_is_recorded_at_every_batch_is_the_mean_over_the_update() -> None:
    weights = torch.nn.Parameter(torch.ones(2))
    opt = metaopt.build([weights], "accumulate(3) | sgd(lr=0.1)", log_every=1)
    for at in range(6):
        weights.grad = torch.ones(2)
        opt.record(loss=float(at))
        opt.step()
        expected = sum(range(at // 3 * 3, at + 1)) / (at % 3 + 1)
        assert opt.metrics()["train/loss"] == pytest.approx(expected)
    # a window that a part behind throws away takes its records along
    opt = metaopt.build([weights], "accumulate(2) | skip_nonfinite(9) | sgd(lr=0.1)", log_every=1)
    for loss, gradient in [(7.0, float("inf")), (8.0, 1.0), (1.0, 1.0), (2.0, 1.0)]:
        weights.grad = torch.full((2,), gradient)
        opt.record(loss=loss)
        opt.step()
    assert opt.updates == 1 and opt.metrics()["train/loss"] == pytest.approx(1.5)


def test_the_loss_of_a_closure_counts_at_every_batch() -> None:
    weights = torch.nn.Parameter(torch.ones(2))
    opt = metaopt.build([weights], "accumulate(2) | sgd(lr=0.1)", log_every=1)
    for value in (1.0, 5.0):

        def closure(value: float = value) -> torch.Tensor:
            weights.grad = torch.ones(2)
            return torch.tensor(value)

        opt.step(closure)
    assert opt.updates == 1 and opt.metrics()["train/loss"] == pytest.approx(3.0)


@pytest.mark.parametrize("weights", [None, (2.0, 0.5, 3.0)])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_window_begins_without_anything_of_the_last_one(steps: int, weights: tuple[float, ...] | None) -> None:
    params = [torch.nn.Parameter(torch.zeros(4, 2, dtype=torch.float64)) for _ in range(3)]
    opt = metaopt.build(params, f"accumulate({steps}) | sgd(lr=1.0)")
    random = torch.Generator().manual_seed(steps)
    # which parameters have a gradient at each step of a window, after a first window in which all have
    rounds = [(True, True, True), (True, False, False), (False, True, False), (False, False, True), (True, True, False)]
    expected = [torch.zeros(4, 2, dtype=torch.float64) for _ in params]
    for number in range(7):
        sums, total = [torch.zeros(4, 2, dtype=torch.float64) for _ in params], 0.0
        for step in range(steps):
            weight = 1.0 if weights is None else weights[step]
            total += weight
            for i, p in enumerate(params):
                p.grad = None
                if number == 0 or rounds[(number + 2 * step) % len(rounds)][i]:
                    gradient = torch.randn(4, 2, dtype=torch.float64, generator=random)
                    p.grad = gradient.clone()
                    sums[i] += weight * gradient
            if weights is not None:
                opt.weigh(weight)
            opt.step()
        for mean, s in zip(expected, sums, strict=True):
            mean -= s / total
        for p, weight_expected in zip(params, expected, strict=True):
            torch.testing.assert_close(p.detach(), weight_expected, **CLOSE)
    assert opt.updates == 7


@pytest.mark.parametrize("steps", [1, 2])
def test_a_weight_on_the_device_that_is_no_number_is_not_hidden(steps: int) -> None:
    weights = torch.nn.Parameter(torch.ones(2))
    opt = metaopt.build([weights], f"accumulate({steps}) | sgd(lr=0.1)")
    for _ in range(steps):
        weights.grad = torch.ones(2)
        opt.weigh(torch.tensor(float("nan")))
        opt.step()
    assert weights.isnan().all()
