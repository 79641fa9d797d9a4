"""Every wrapper of the family against its paper's formula on plain float64 tensors, step by step."""

import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import metaopt

STEPS = 60
CLOSE = {"rtol": 1e-12, "atol": 1e-14}
SHAPES = ((4, 3), (3,), (2, 2, 2), ())


def start() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def gradient(weights: list[torch.Tensor], step: int) -> list[torch.Tensor]:
    """Return a gradient that depends on the weights and, as noise does, on the step."""
    generator = torch.Generator().manual_seed(1000 + step)
    noise = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights]
    return [w + 0.5 * torch.sin(3 * w) + n for w, n in zip(weights, noise, strict=True)]


def run(spec: str, steps: int = STEPS, call: int = 1) -> tuple[list[list[torch.Tensor]], metaopt.Stack]:
    """Return the weights after every step() of the stack, with the loss's gradients of `gradient`."""
    parameters = [torch.nn.Parameter(w) for w in start()]
    opt = metaopt.build(parameters, spec)
    path = []
    for step in range(steps):

        def closure(step: int = step) -> torch.Tensor:
            for p, g in zip(parameters, gradient([p.detach() for p in parameters], step), strict=True):
                p.grad = g
            return torch.zeros(())

        opt.step(closure)
        path.append([p.detach().clone() for p in parameters])
    return path, opt


def same(path: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> None:
    for step, (found, wanted) in enumerate(zip(path, expected, strict=True)):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, **CLOSE, msg=lambda m, step=step: f"step {step}: {m}")


def norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.sqrt(sum((t**2).sum() for t in tensors))


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_takes_the_gradient_where_it_climbed_to(adaptive: bool) -> None:
    weights, expected, rho = start(), [], 0.1
    for step in range(STEPS):
        g = gradient(weights, step)
        if adaptive:
            length = rho / (norm([w.abs() * x for w, x in zip(weights, g, strict=True)]) + 1e-12)
            climbed = [w + w**2 * x * length for w, x in zip(weights, g, strict=True)]
        else:
            climbed = [w + rho * x / (norm(g) + 1e-12) for w, x in zip(weights, g, strict=True)]
        weights = [w - 0.1 * x for w, x in zip(weights, gradient(climbed, step), strict=True)]
        expected.append(weights)
    same(run(f"sam(rho={rho}, adaptive={adaptive}) | sgd(lr=0.1)")[0], expected)


def rows(t: torch.Tensor) -> tuple[int, ...] | None:
    return tuple(range(1, t.dim())) if t.dim() > 1 else None


def row_norm(t: torch.Tensor) -> torch.Tensor:
    return torch.sqrt((t**2).sum(rows(t), keepdim=True)) if t.dim() > 1 else torch.sqrt((t**2).sum())


def test_adaptive_grad_clip_bounds_each_row_by_its_weights() -> None:
    weights, expected = start(), []
    weights[0][1] = 0.0  # a row that starts at zero moves by the floor eps
    for step in range(STEPS):
        clipped = []
        for w, g in zip(weights, gradient(weights, step), strict=True):
            bound = 0.05 * row_norm(w).clamp(min=1e-3)
            clipped.append(torch.where(row_norm(g) > bound, g * bound / row_norm(g), g))
        weights = [w - 0.1 * g for w, g in zip(weights, clipped, strict=True)]
        expected.append(weights)
    parameters = start()
    parameters[0][1] = 0.0
    opt = metaopt.build(
        members := [torch.nn.Parameter(w) for w in parameters], "adaptive_grad_clip(0.05, eps=1e-3) | sgd(lr=0.1)"
    )
    for step, wanted in enumerate(expected):
        for p, g in zip(members, gradient([p.detach() for p in members], step), strict=True):
            p.grad = g
        opt.step()
        for p, w in zip(members, wanted, strict=True):
            torch.testing.assert_close(p.detach(), w, **CLOSE)
    assert members[0].detach()[1].abs().sum() > 0


def test_centralized_rows_have_no_mean() -> None:
    weights, expected = start(), []
    for step in range(STEPS):
        g = [x - x.mean(rows(x), keepdim=True) if x.dim() > 1 else x for x in gradient(weights, step)]
        weights = [w - 0.1 * x for w, x in zip(weights, g, strict=True)]
        expected.append(weights)
    same(run("centralize | sgd(lr=0.1)")[0], expected)


@pytest.mark.parametrize("clear", ["optimizer", "model", "never"])
def test_accumulated_gradients_make_one_update_of_their_mean(clear: str) -> None:
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    twin = torch.nn.Linear(3, 2, dtype=torch.float64)
    twin.load_state_dict(model.state_dict())
    opt = metaopt.build(model, "accumulate(4) | clip_grad_norm(0.1) | adamw(lr=0.1) | lookahead(k=2)")
    whole = metaopt.build(twin, "clip_grad_norm(0.1) | adamw(lr=0.1) | lookahead(k=2)")
    for window in range(6):
        data = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(window))
        for micro, batch in enumerate(data):
            if clear == "optimizer":
                opt.zero_grad()
            elif clear == "model":
                model.zero_grad()
            model(batch).square().mean().backward()
            opt.step()
            assert (opt.skipped is None) == (micro == 3)
        assert all(p.grad is None for p in model.parameters())
        whole.zero_grad()
        torch.stack([twin(batch).square().mean() for batch in data]).mean().backward()
        whole.step()
        assert opt.updates == whole.updates == window + 1
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, **CLOSE)


@pytest.mark.parametrize("at", [1, 2, 3, 6, 9])
def test_a_checkpoint_in_mid_window_resumes_exactly(at: int) -> None:
    spec = "accumulate(4) | adagrad(lr=0.1) | lookahead(k=2)"

    def train(model: torch.nn.Module, opt: metaopt.Stack, first: int, last: int) -> None:
        for step in range(first, last):
            batch = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
            model(batch).square().mean().backward()
            opt.step()

    model = torch.nn.Linear(3, 2)
    opt = metaopt.build(model, spec)
    train(model, opt, 0, at)
    other = torch.nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    again = metaopt.build(other, spec)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))  # torch does not copy tensors at load
    train(model, opt, at, 13)
    train(other, again, at, 13)
    assert opt.updates == again.updates == 3
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_accumulation_before_the_first_update_leaves_weights_and_state_as_a_new_run_has_them() -> None:
    model, twin = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    opt, plain = metaopt.build(model, "accumulate(2) | adam(lr=0.1)"), metaopt.build(twin, "adam(lr=0.1)")
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        opt.step()
    twin(torch.ones(1, 3)).sum().backward()
    plain.step()
    assert opt.state[model.weight]["step"] == 1
    assert torch.equal(model.weight, twin.weight)


def test_an_update_from_gradients_that_are_not_finite_is_skipped_and_counted() -> None:
    x = torch.nn.Parameter(torch.ones(2))
    opt = metaopt.build([x], "skip_nonfinite(3) | adam(lr=0.1) | lookahead(k=2)")
    for bad in (1.0, math.nan, math.inf, 1.0, math.nan, -math.inf):
        before, updates = x.detach().clone(), opt.updates
        x.grad = torch.tensor([0.5, bad])
        opt.step()
        if math.isfinite(bad):
            assert opt.updates == updates + 1 and opt.skipped is None
        else:
            assert torch.equal(x, before) and opt.updates == updates
            assert opt.skipped == "gradients that are not finite"
    assert opt.param_groups[0]["skip_nonfinite.in_a_row"] == 2
    x.grad = torch.full((2,), math.nan)
    with pytest.raises(metaopt.StepError, match="3 times in a row"):
        opt.step()


def test_the_decision_to_skip_waits_for_one_number_per_update() -> None:
    class Reads(TorchDispatchMode):
        """Counts the values that the host reads from tensors."""

        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    members = [torch.nn.Parameter(w) for w in start()]
    opt = metaopt.build([{"params": members[:2]}, {"params": members[2:]}], "skip_nonfinite(3) | sgd(lr=0.1)")
    for bad in (1.0, math.nan, 1.0):
        for p in members:
            p.grad = torch.full_like(p, bad)
        with Reads() as reads:
            opt.step()
        assert reads.count == 1
    assert opt.updates == 2


@pytest.mark.parametrize("base", ["sgd(lr=0.1, momentum=0.9, {})", "adam(lr=0.1, {})", "rmsprop(lr=0.1, {})"])
def test_l2_is_the_base_s_own_coupled_decay(base: str) -> None:
    same(run("l2(0.1) | " + base.format(""))[0], run(base.format("weight_decay=0.1"))[0])


def test_decay_around_adam_is_adamw() -> None:
    same(run("decay(0.1) | adam(lr=0.1)")[0], run("adamw(lr=0.1, weight_decay=0.1)")[0])


def test_l2_around_adam_is_not_adamw() -> None:
    coupled, decoupled = run("l2(0.1) | adam(lr=0.1)")[0], run("adamw(lr=0.1, weight_decay=0.1)")[0]
    assert not torch.allclose(coupled[-1][0], decoupled[-1][0], rtol=1e-3)


def test_decay_follows_the_base_s_schedule() -> None:
    rate = "linear(0.1, 0.01, steps=50)"
    same(run(f"decay(0.1) | adam(lr={rate})")[0], run(f"adamw(lr={rate}, weight_decay=0.1)")[0])


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, True), (0.6, True), (0.9, False)])
def test_outer_steps_along_the_way_of_k_updates(momentum: float, nesterov: bool) -> None:
    fast, slow, expected = start(), start(), []
    buffer = [torch.zeros_like(w) for w in fast]
    for step in range(1, STEPS + 1):
        fast = [w - 0.1 * g for w, g in zip(fast, gradient(fast, step - 1), strict=True)]
        if step % 4 == 0:
            way = [s - f for s, f in zip(slow, fast, strict=True)]
            buffer = [momentum * b + w for b, w in zip(buffer, way, strict=True)]
            along = [momentum * b + w if nesterov else b for b, w in zip(buffer, way, strict=True)]
            slow = [s - 0.7 * a for s, a in zip(slow, along, strict=True)]
            fast = list(slow)
        expected.append(fast)
    spec = f"sgd(lr=0.1) | outer(k=4, lr=0.7, momentum={momentum}, nesterov={nesterov})"
    path, opt = run(spec)
    same(path, expected)
    with opt.averaged():
        for p, s in zip(opt.param_groups[0]["params"], slow, strict=True):
            torch.testing.assert_close(p.detach(), s, **CLOSE)


def test_outer_without_momentum_is_lookahead() -> None:
    # gradients that do not depend on the weights: a loss would enlarge what the last digits differ in
    gradients = [[g.clone() for g in gradient(start(), step)] for step in range(STEPS)]
    members = [[torch.nn.Parameter(w) for w in start()] for _ in range(2)]
    specs = ("adam(lr=0.1) | lookahead(k=5, alpha=0.7)", "adam(lr=0.1) | outer(k=5, lr=0.7, momentum=0)")
    opts = [metaopt.build(own, spec) for own, spec in zip(members, specs, strict=True)]
    for given in gradients:
        for own, opt in zip(members, opts, strict=True):
            for p, g in zip(own, given, strict=True):
                p.grad = g.clone()
            opt.step()
        ours, theirs = (torch.cat([p.detach().flatten() for p in own]) for own in members)
        assert (ours - theirs).norm() <= 1e-14 * theirs.norm()
    assert not torch.equal(members[0][0], start()[0])


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_follows_the_weights_from_where_training_starts(warmup: bool) -> None:
    path, opt = run(f"adam(lr=0.1) | ema(0.9, warmup={warmup})")
    average = start()
    for t, weights in enumerate(path, start=1):
        d = min(0.9, (1 + t) / (10 + t)) if warmup else 0.9
        average = [d * a + (1 - d) * w for a, w in zip(average, weights, strict=True)]
    same(path, run("adam(lr=0.1)")[0])
    with opt.averaged():
        for p, a in zip(opt.param_groups[0]["params"], average, strict=True):
            torch.testing.assert_close(p.detach(), a, **CLOSE)


def test_several_averages_are_chosen_by_label() -> None:
    _, opt = run("adam(lr=0.1) | ema(0.9, label='short') | ema(0.99, label='long')")
    x = opt.param_groups[0]["params"][0]
    fast = x.detach().clone()
    averages = {label: opt.state[x][f"{label}.average"].clone() for label in ("short", "long")}
    assert not torch.equal(*averages.values())
    for label, average in averages.items():
        with opt.averaged(label):
            assert torch.equal(x, average)
        assert torch.equal(x, fast)
    with opt.averaged():  # the one that is written last
        assert torch.equal(x, averages["long"])


@pytest.mark.parametrize("base", ["sgd(lr=0.1, momentum=0.9)", "adam(lr=0.1)", "adamw(lr=0.1, weight_decay=0.1)"])
def test_cautious_masks_what_goes_up_the_gradient_and_makes_up_for_it(base: str) -> None:
    reference = [torch.nn.Parameter(w) for w in start()]
    inner = metaopt.build(reference, base)
    expected = []
    for step in range(STEPS):
        before = [p.detach().clone() for p in reference]
        g = gradient(before, step)
        for p, x in zip(reference, g, strict=True):
            p.grad = x.clone()
        inner.step()
        for p, w, x in zip(reference, before, g, strict=True):
            u = p.detach() - w
            mask = (u * x < 0).double()
            with torch.no_grad():
                p.copy_(w + u * mask / mask.mean().clamp(min=1e-3))
        expected.append([p.detach().clone() for p in reference])
    same(run(f"{base} | cautious")[0], expected)


def test_sam_clips_and_looks_ahead_like_any_other() -> None:
    weights, slow, expected = start(), start(), []
    for step in range(1, STEPS + 1):
        g = gradient(weights, step - 1)
        g = gradient([w + 0.1 * x / norm(g) for w, x in zip(weights, g, strict=True)], step - 1)
        factor = min(1.0, 0.5 / (float(norm(g)) + 1e-6))
        weights = [w - 0.1 * factor * x for w, x in zip(weights, g, strict=True)]
        if step % 3 == 0:
            slow = [s + 0.5 * (w - s) for s, w in zip(slow, weights, strict=True)]
            weights = list(slow)
        expected.append(weights)
    same(run("sam(rho=0.1) | clip_grad_norm(0.5) | sgd(lr=0.1) | lookahead(k=3)")[0], expected)
