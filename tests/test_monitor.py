"""`monitor` measures what it says, held against torch by hand, and changes nothing."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import metaopt
from metaopt import HyperparameterError, Logger

EVERYTHING = (
    "monitor(effective_lr=True, alignment=True, sign_agreement=True, moments=True, noise_scale=True, sharpness=2, "
    "histograms=True)"
)


class Log(Logger):
    """Keeps points and histograms."""

    def __init__(self):
        self.points, self.histograms_ = {}, {}

    def open(self, *, step, tags, spec, hparams):
        pass

    def scalars(self, step, values):
        self.points.setdefault(step, {}).update(values)

    def histograms(self, step, values):
        self.histograms_[step] = dict(values)


def network(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.BatchNorm1d(6), torch.nn.Dropout(dropout)]
    return torch.nn.Sequential(*layers, torch.nn.Linear(6, 2))


def train(spec, *, updates=6, log=None, every=1, model=None, steps=None):
    model = network() if model is None else model
    opt = metaopt.build(model, spec, log=log, log_every=every, total_steps=20)
    data = torch.Generator().manual_seed(3)
    for _ in range(steps or updates):
        batch = torch.randn(8, 4, generator=data)

        def closure(batch=batch):
            opt.zero_grad()
            loss = model(batch).square().mean()
            loss.backward()
            return loss

        opt.step(closure)
    opt.close()
    return model, opt


def state_of(model, opt):
    tensors = [*model.state_dict().values()]
    for p in model.parameters():
        tensors += [v for k, v in opt.state[p].items() if not k.startswith("monitor.") and torch.is_tensor(v)]
    return tensors


@pytest.mark.parametrize(
    "before, base, behind",
    [
        ("clip_grad_norm(0.1)", "adamw(lr=0.05)", "lookahead(k=2)"),
        ("accumulate(2)", "sgd(lr=0.05, momentum=0.9)", "cautious"),
        ("sam", "adam(lr=0.05)", "clip_update_norm(0.1) | ema"),
        ("gradient_noise", "adamw(lr=0.05)", "mechanic"),
        ("centralize", "partition({'0.*': sgd(lr=0.1), '*': adamw(lr=0.01) | cautious})", "lookahead(k=3)"),
        ("clip_grad_norm(0.1)", "switch(adamw(lr=0.01), 3, sgd(lr=0.1))", "ema"),
    ],
)
def test_a_run_that_is_looked_at_is_the_same_bit_for_bit_wherever_the_monitor_is_written(before, base, behind):
    plain = state_of(*train(f"{before} | {base} | {behind}", model=network(dropout=0.2)))
    drawn = torch.rand(())
    for spec in (
        f"{EVERYTHING} | {before} | {base} | {behind}",
        f"{before} | {EVERYTHING} | {base} | {behind}",
        f"{before} | {base} | {EVERYTHING} | {behind}",
        f"{before} | {base} | {behind} | {EVERYTHING}",
    ):
        watched = state_of(*train(spec, model=network(dropout=0.2), log=Log(), every=2))
        assert torch.equal(torch.rand(()), drawn)  # the run's random numbers are where they were
        assert len(watched) == len(plain) and all(map(torch.equal, watched, plain)), spec


def test_where_it_is_written_makes_no_difference_to_what_it_measures():
    first, last = Log(), Log()
    train(f"{EVERYTHING} | clip_grad_norm(0.1) | adamw(lr=0.05) | lookahead(k=2)", log=first)
    train(f"clip_grad_norm(0.1) | adamw(lr=0.05) | lookahead(k=2) | {EVERYTHING}", log=last)
    assert first.points == last.points and len(first.points) == 6


def test_the_numbers_are_those_of_torch_by_hand():
    model, log = network(), Log()
    opt = metaopt.build(
        model, "clip_grad_norm(0.3) | adamw(lr=0.05) | lookahead(k=2) | " + EVERYTHING, log=log, log_every=1
    )
    last = None
    for update in range(1, 6):
        opt.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        before = [p.detach().clone() for p in model.parameters()]
        opt.step()
        w = [p.detach() for p in model.parameters()]
        d = [a - b for a, b in zip(w, before, strict=True)]
        g = [p.grad.clone() for p in model.parameters()]  # as clipped
        flat = {name: torch.cat([t.flatten() for t in x]) for name, x in {"w": w, "d": d, "g": g}.items()}
        m = [opt.state[p]["exp_avg"] for p in model.parameters()]
        expected = {
            "param_norm": flat["w"].norm(),
            "grad_norm": flat["g"].norm(),
            "update_ratio": flat["d"].norm() / flat["w"].norm(),
            "effective_lr": flat["d"].norm() / flat["g"].norm(),
            "alignment": torch.cosine_similarity(flat["d"], -flat["g"], dim=0),
            "sign_agreement": (flat["d"] * flat["g"] < 0).float().mean(),
            "moments/exp_avg": torch.cat([t.flatten() for t in m]).norm(),
            "param_norm/0.weight": w[0].norm(),
            "update_ratio/0.bias": d[1].norm() / w[1].norm(),
            "alignment/4.weight": torch.cosine_similarity(d[4].flatten(), -g[4].flatten(), dim=0),
        }
        if last is not None:
            expected["last_alignment"] = torch.cosine_similarity(flat["g"], last, dim=0)
        last = flat["g"]
        for name, value in expected.items():
            assert log.points[update][f"monitor/{name}"] == pytest.approx(float(value), rel=1e-5, abs=1e-6), name


def test_the_gradient_before_a_logged_update_is_remembered():
    each, seldom = Log(), Log()
    train("sgd(lr=0.1) | monitor(alignment=True)", log=each)
    train("sgd(lr=0.1) | monitor(alignment=True)", log=seldom, every=3)
    for update in (3, 6):
        tag = "monitor/last_alignment"
        assert seldom.points[update][tag] == each.points[update][tag] != 0.0


def test_a_second_moment_below_eps_is_counted():
    log = Log()
    p = torch.nn.Parameter(torch.ones(4))
    opt = metaopt.build([p], "adam(lr=0.1, eps=0.01) | monitor(moments=True)", log=log, log_every=1)
    p.grad = torch.tensor([1.0, 1e-3, 1e-3, 1e-3])  # v = 0.001 g^2
    opt.step()
    assert log.points[1]["monitor/second_below_eps"] == 0.75


def test_without_a_pattern_the_five_largest_and_smallest_are_shown_by_name():
    model, log = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(20))), Log()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.fill_(float(i + 1))
    opt = metaopt.build(model, "sgd(lr=0.0) | monitor", log=log, log_every=1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    sizes = {name: float(p.detach().norm()) for name, p in model.named_parameters()}
    order = sorted(sizes, key=lambda name: sizes[name])
    shown = {tag.removeprefix("monitor/param_norm/"): x for tag, x in log.points[1].items() if "param_norm/" in tag}
    assert shown == pytest.approx({name: sizes[name] for name in (*order[:5], *order[-5:])})


def test_a_pattern_chooses_the_tensors_and_the_whole_stays_the_whole():
    log, all_of_it = Log(), Log()
    train("adamw(lr=0.01) | monitor('4.*', grad_norm=False)", log=log, updates=1)
    train("adamw(lr=0.01) | monitor", log=all_of_it, updates=1)
    tags = {tag for tag in log.points[1] if tag.startswith("monitor/")}
    names = ("4.weight", "4.bias")
    assert tags == {f"monitor/{m}{n}" for m in ("update_ratio", "param_norm") for n in ("", *(f"/{x}" for x in names))}
    assert all(log.points[1][tag] == all_of_it.points[1][tag] for tag in tags)


def test_a_pattern_that_matches_nothing_is_refused_when_the_stack_is_built():
    with pytest.raises(HyperparameterError, match=r"tensors='block\.\*' must match .*0\.weight"):
        metaopt.build(network(), "adamw(lr=0.01) | monitor('block.*')")


def test_a_dead_layer_has_a_ratio_of_zero_and_comes_first():
    model, log = network(), Log()
    opt = metaopt.build(model, "sgd(lr=0.1) | monitor", log=log, log_every=1)
    model(torch.randn(8, 4)).square().mean().backward()
    model[0].weight.grad.zero_()
    opt.step()
    assert log.points[1]["monitor/update_ratio/0.weight"] == 0.0
    assert log.points[1]["monitor/update_ratio/4.weight"] > 0.0


def test_the_sharpness_is_the_largest_eigenvalue_and_costs_what_it_says():
    torch.manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    hessian = q @ torch.diag(torch.tensor([9.0, 2.0, 1.0, 0.5, 0.1, 0.01], dtype=torch.float64)) @ q.T
    x, log, evaluations = torch.nn.Parameter(torch.ones(6, dtype=torch.float64)), Log(), []
    opt = metaopt.build([x], "sgd(lr=0.01) | monitor(sharpness=2, iterations=6)", log=log, log_every=1)

    def closure():
        evaluations.append(1)
        opt.zero_grad()
        loss = x @ hessian @ x / 2
        loss.backward()
        return loss

    counts = []
    for _ in range(4):
        evaluations.clear()
        opt.step(closure)
        counts.append(len(evaluations))
    assert counts == [1, 8, 1, 8]  # iterations + 1 more
    assert log.points[2]["monitor/sharpness"] == pytest.approx(9.0, rel=1e-2)
    assert "monitor/sharpness" not in log.points[3]


def test_without_a_closure_there_is_no_sharpness_and_no_error():
    log = Log()
    model = network()
    opt = metaopt.build(model, "sgd(lr=0.01) | monitor(sharpness=1)", log=log, log_every=1)
    model(torch.randn(8, 4)).square().mean().backward()
    opt.step()
    assert "monitor/sharpness" not in log.points[1] and "monitor/update_ratio" in log.points[1]


def test_the_noise_scale_is_that_of_known_gradients():
    # gradient of a batch: a mean of ones, and noise of variance 4 in each of 200 elements: 200 * 4 / 200 = 4 batches
    torch.manual_seed(1)
    p, log = torch.nn.Parameter(torch.zeros(200)), Log()
    spec = "clip_grad_norm(1.0) | sgd(lr=0.0) | monitor(noise_scale=True)"
    opt = metaopt.build([p], "accumulate(4) | " + spec, log=log, log_every=1)
    for _ in range(4 * 60):
        p.grad = 1.0 + 2.0 * torch.randn(200)
        opt.step()
    assert len(log.points) == 60
    assert log.points[60]["monitor/noise_scale"] == pytest.approx(4.0, rel=0.25)


def test_histograms_hold_every_element_in_the_bin_of_its_size():
    p, log = torch.nn.Parameter(torch.tensor([0.0, 1.5, -3.0, 3.9, 0.3])), Log()
    opt = metaopt.build([("w", p)], "sgd(lr=0.0) | monitor('w', histograms=True)", log=log, log_every=1)
    p.grad = torch.tensor([1e20, -1e20, 1.0, -1.0, 1e-30])
    opt.step()
    found = log.histograms_[1]["monitor/weights/w"]
    bins = list(zip(itertools.pairwise(found.edges), found.counts, strict=True))
    counted = {edges: count for edges, count in bins if count}
    assert counted == {(-4.0, -2.0): 1, (-(2.0**-40), 2.0**-40): 1, (0.25, 0.5): 1, (1.0, 2.0): 1, (2.0, 4.0): 1}
    assert sum(log.histograms_[1]["monitor/gradients/w"].counts) == 5
    assert log.histograms_[1]["monitor/weights"] == found


class Reads(TorchDispatchMode):
    """Counts the values that the host reads from tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_from_the_device_between_two_points():
    spec = f"{EVERYTHING} | accumulate(2) | clip_grad_norm(1.0) | adamw(lr=0.01)"
    model = network()
    opt = metaopt.build(model, spec, log_every=1)  # measured at every update, and nobody writes
    for _ in range(6):
        model(torch.randn(8, 4)).square().mean().backward()
        with Reads() as reads:
            opt.step()
        assert reads.count == 0
    assert opt.metrics()["monitor/update_ratio"] > 0.0


def test_sparse_gradients_and_bases_with_odd_states_are_measured():
    log = Log()
    table = torch.nn.Embedding(5, 2, sparse=True)
    opt = metaopt.build(table, "sgd(lr=0.1) | monitor(alignment=True, sign_agreement=True)", log=log, log_every=1)
    table(torch.tensor([1, 1, 3])).sum().backward()
    opt.step()
    assert log.points[1]["monitor/grad_norm"] == pytest.approx((2 * 4.0 + 2 * 1.0) ** 0.5)
    log = Log()
    train("adafactor(lr=0.01) | monitor(moments=True)", log=log, updates=2)
    assert any(tag.startswith("monitor/moments/row_var/") for tag in log.points[2])


def test_a_part_that_only_looks_makes_no_state() -> None:
    log = Log()
    _, opt = train("sgd(lr=0.1) | monitor", log=log)
    assert not opt.state
