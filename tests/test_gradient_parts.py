"""Parts on gradients and updates: their rules on plain tensors, their random numbers, resumed runs, 16 bits."""

import copy
import math

import pytest
import reference_gradients as plain
import torch
from gradient_runs import BASES, GROUPS, PARTS, SHAPES, STEPS, build, gradient, presence, step, weights

import metaopt


def reference(part: str, base: str, lr: float = 0.1) -> plain.PlainRun:
    rule, *given = PARTS[part]
    number = [own for i in range(len(SHAPES)) for own, members in enumerate(GROUPS) if i in members]
    made = plain.Base(base.replace("momentum", "sgd"), [lr / (1 + own) for own in number], **BASES[base][1])
    run = plain.PlainRun(weights(), made, rule([given[own] for own in number]))
    draw = {"gradient_noise": normal_noise, "magma": coins}.get(part)
    run.rule.kept.update(draw(STEPS) if draw else {})
    return run


def normal_noise(steps: int, seed: int = 0) -> dict[tuple[int, int], torch.Tensor]:
    """Return the noise of each update and parameter with variance 1: what a rate of 1 makes of no gradient."""
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    opt = metaopt.build(named, f"gradient_noise(eta=1.0, gamma=0.0, seed={seed}) | sgd(lr=1.0)")
    found = {}
    for t in range(steps):
        for p in params:
            p.data.zero_()
            p.grad = torch.zeros_like(p)
        opt.step()
        found.update({(t, i): -p.detach().clone() for i, p in enumerate(params)})
    return found


def coins(steps: int, seed: int = 0) -> dict[tuple[int, int], float]:
    """Return which parameters move in which update, with the probability of their group."""
    _, *given = PARTS["magma"]
    params = {i: torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for members in GROUPS for i in members}
    entries = [
        {"params": [(f"p{i}", params[i]) for i in members], "magma.keep": own["keep"]}
        for members, own in zip(GROUPS, given, strict=True)
    ]
    opt = metaopt.build(entries, f"sgd(lr=1.0) | magma(seed={seed})")
    found = {}
    for t in range(steps):
        for p in params.values():
            p.data.zero_()
            p.grad = torch.ones_like(p)
        opt.step()
        found.update({(t, i): float(p.abs().sum() > 0) for i, p in params.items()})
    return found


@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("part", PARTS)
def test_every_update_follows_the_rule_of_the_part(part: str, base: str, uneven: bool) -> None:
    lr = 1.0 if part.startswith("mechanic") else 0.1
    run = reference(part, base, lr)
    params, opt = build(part, base, weights(), lr=lr)
    for number in range(STEPS):
        run.step(gradient(number), presence(number, uneven=uneven))
        step(params, opt, number, uneven=uneven)
        for i, p in params.items():
            torch.testing.assert_close(p.detach(), run.weights[i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("part", PARTS)
def test_the_part_matters(part: str) -> None:
    lr = 1.0 if part.startswith("mechanic") else 0.1
    params, opt = build(part, "momentum", weights(), lr=lr)
    base = plain.Base("sgd", [lr / (1 + (i > 2)) for i in range(len(SHAPES))], momentum=0.9)
    bare = plain.PlainRun(weights(), base, plain.Rule([{}] * len(SHAPES)))
    for number in range(STEPS):
        bare.step(gradient(number), presence(number, uneven=False))
        step(params, opt, number, uneven=False)
    assert max((p.detach() - bare.weights[i]).abs().max() for i, p in params.items() if p.numel()) > 1e-3


@pytest.mark.parametrize("saved_after", [1, 6])
@pytest.mark.parametrize("part", PARTS)
def test_a_resumed_run_goes_on_bit_for_bit_with_its_random_numbers(part: str, saved_after: int) -> None:
    params, opt = build(part, "adamw", weights())
    for number in range(saved_after):
        step(params, opt, number, uneven=True)
    saved, kept = copy.deepcopy(opt.state_dict()), [p.detach().clone() for p in params.values()]
    torch.manual_seed(99)  # torch's own generator has no part in it
    later_params, later = build(part, "adamw", kept)
    later.load_state_dict(saved)
    for number in range(saved_after, STEPS):
        step(params, opt, number, uneven=True)
        step(later_params, later, number, uneven=True)
        assert all(torch.equal(p, later_params[i]) for i, p in params.items()), number


@pytest.mark.parametrize("part", PARTS)
def test_another_order_of_groups_and_parameters_makes_the_same_updates(part: str) -> None:
    params, opt = build(part, "adam", weights())
    turned_params, turned = build(part, "adam", weights(), order=[m[::-1] for m in GROUPS[::-1]])
    # a sum over all parameters depends on their order in its last bit
    tolerance = 1e-12 if part.startswith(("zclip", "mechanic")) else 0.0
    for number in range(STEPS):
        step(params, opt, number, uneven=True)
        step(turned_params, turned, number, uneven=True)
        for i, p in params.items():
            torch.testing.assert_close(p, turned_params[i], rtol=tolerance, atol=tolerance)


def test_noise_is_standard_normal_and_new_for_each_seed_update_and_parameter() -> None:
    drawn = []
    for seed, shape in [(0, (100, 200)), (1, (100, 200))]:
        params = [torch.nn.Parameter(torch.zeros(shape)) for _ in range(2)]
        opt = metaopt.build(params, f"gradient_noise(eta=1.0, gamma=0.0, seed={seed}) | sgd(lr=1.0)")
        for _ in range(2):
            for p in params:
                p.data.zero_()
                p.grad = torch.zeros_like(p)
            opt.step()
            drawn += [p.detach().clone().flatten() for p in params]
    together = torch.stack(drawn)
    n = together.shape[1]
    assert together.mean(1).abs().max() < 4.5 / math.sqrt(n)
    assert (together.var(1) - 1).abs().max() < 4.5 * math.sqrt(2 / n)
    assert ((together**4).mean(1) - 3).abs().max() < 4.5 * math.sqrt(96 / n)
    assert (torch.corrcoef(together) - torch.eye(len(drawn))).abs().max() < 4.5 / math.sqrt(n)


@pytest.mark.parametrize("keep", [0.2, 0.5, 1.0])
def test_tensors_move_as_often_as_the_probability_says(keep: float) -> None:
    params = [torch.nn.Parameter(torch.zeros(1 + i % 3)) for i in range(40)]
    opt = metaopt.build(params, f"sgd(lr=1.0) | magma(keep={keep})")
    moved = []
    for _ in range(25):
        for p in params:
            p.data.zero_()
            p.grad = torch.ones_like(p)
        opt.step()
        moved.append([float(p.abs().min() > 0) for p in params])
        assert all(float(p.abs().min() > 0) == m for p, m in zip(params, moved[-1], strict=True))
    found = torch.tensor(moved)
    assert (found.mean() - keep).abs() <= 4.5 * math.sqrt(keep * (1 - keep) / found.numel())
    if keep < 1:
        assert len({tuple(row) for row in moved}) == 25
        assert len({tuple(column) for column in found.T.tolist()}) > 35


def test_a_tensor_that_rests_still_feeds_the_base() -> None:
    params, opt = build("magma", "adam", weights())
    bare = [torch.nn.Parameter(w.clone()) for w in weights()]
    adam = torch.optim.Adam(bare, lr=0.1)
    for number in range(6):
        for i, p in enumerate(bare):
            p.grad = gradient(number)(i, torch.zeros_like(p))
            params[i].grad = p.grad.clone()
        adam.step()
        opt.step()
    for i, p in enumerate(bare):
        torch.testing.assert_close(opt.state[params[i]]["exp_avg_sq"], adam.state[p]["exp_avg_sq"], rtol=1e-13, atol=0)


@pytest.mark.parametrize("part", [part for part in PARTS if part.startswith("zclip")])
def test_spikes_are_clipped_and_nothing_is_before_the_end_of_the_warm_up(part: str) -> None:
    run, lone = reference(part, "sgd"), reference(part, "sgd")
    lone.rule = plain.Rule([{}] * len(SHAPES))
    params, opt = build(part, "sgd", weights())
    parted = None
    for number in range(STEPS):
        for each in (run, lone):
            each.step(gradient(number), presence(number, uneven=False))
        step(params, opt, number, uneven=False)
        if parted is None and not torch.equal(run.weights[0], lone.weights[0]):
            parted = number
    assert parted == 4  # the first spike is the fifth step
    name = "zclip.mean"
    assert float(opt.param_groups[0][name]) == pytest.approx(run.rule.kept["mean"], rel=1e-12)
    assert float(opt.param_groups[0]["zclip.variance"]) == pytest.approx(run.rule.kept["variance"], rel=1e-10)


# bfloat16 has no weights a millionth apart, which is how far the first steps of mechanic go by default
@pytest.mark.parametrize("part", sorted(set(PARTS) - {"mechanic from afar"}))
def test_weights_of_16_bits_come_near_those_of_32(part: str) -> None:
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        params, opt = build(part, "adam", [w.to(dtype) for w in weights()], lr=0.5 if part == "mechanic" else 0.05)
        for _ in range(40):
            for p in params.values():
                p.grad = p.detach() * 0.5 if part != "orthograd" else p.detach() - 1.0
            opt.step()
        assert all(p.dtype == dtype and p.isfinite().all() for p in params.values())
        ends.append(torch.cat([p.detach().float().flatten() for p in params.values()]))
    begun = torch.cat([w.float().flatten() for w in weights()])
    moved = (ends[0] - begun).norm()
    assert moved > 0.3
    assert (ends[1] - ends[0]).norm() < 0.25 * moved


def test_zclip_follows_schedules() -> None:
    params = [torch.nn.Parameter(w) for w in weights()]
    opt = metaopt.build(params, "zclip(linear(0.5, 0.9, steps=8), linear(0.4, 1.6, steps=8), warmup=2) | sgd(lr=0.1)")
    rule = plain.Zclip([{}] * len(SHAPES))
    run = plain.PlainRun(weights(), plain.Base("sgd", [0.1] * len(SHAPES)), rule)
    for number in range(STEPS):
        done = min(number / 8, 1.0)
        rule.given = [{"alpha": 0.5 + 0.4 * done, "z_thresh": 0.4 + 1.2 * done, "warmup": 2}] * len(SHAPES)
        run.step(gradient(number), presence(number, uneven=False))
        step(dict(enumerate(params)), opt, number, uneven=False)
        for p, w in zip(params, run.weights, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.complex64])
@pytest.mark.parametrize("part", sorted(set(PARTS) - {"gradient_noise"}))
def test_zero_gradients_move_nothing_and_leave_no_nan(part: str, dtype: torch.dtype) -> None:
    params, opt = build(part, "momentum", [w.to(dtype) for w in weights()])
    for _ in range(5):
        for p in params.values():
            p.grad = torch.zeros_like(p)
        opt.step()
    for p, w in zip(params.values(), weights(), strict=True):
        assert torch.equal(p.detach(), w.to(dtype))
        assert all(t.isfinite().all() for t in opt.state[p].values() if isinstance(t, torch.Tensor))
    for number in range(8):
        step(params, opt, number, uneven=True)
    assert all(p.isfinite().all() for p in params.values())


@pytest.mark.parametrize("part", sorted(set(PARTS) - {"magma", "gradient_noise"}))  # their random numbers are others
def test_complex_weights_move_as_their_two_components(part: str) -> None:
    lr = 1.0 if part.startswith("mechanic") else 0.1
    values = [torch.complex(w, w.flip(0) if w.dim() else -w) for w in weights()]
    params, opt = build(part, "sgd", values, lr=lr)
    parted_params, parted = build(part, "sgd", [torch.view_as_real(w) for w in values], lr=lr)
    for number in range(STEPS):
        for i, p in params.items():
            q = parted_params[i]
            q.grad = gradient(number)(i, q.detach())
            p.grad = torch.view_as_complex(q.grad.clone())
        opt.step()
        parted.step()
        for i, p in params.items():
            torch.testing.assert_close(
                torch.view_as_real(p.detach()), parted_params[i].detach(), rtol=1e-11, atol=1e-11
            )
