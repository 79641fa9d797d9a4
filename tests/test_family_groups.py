"""Hyperparameters of the family: apart in each group, over time, and out of a checkpoint."""

import copy

import pytest
import torch

import metaopt
from metaopt.registry import registry

# one value for each of two groups, of every hyperparameter that acts on a group by itself
APART = {
    "adaptive_grad_clip.clipping": (0.02, 0.5),
    "adaptive_grad_clip.eps": (1e-3, 2.0),
    "clip_grad_value.clip_value": (0.1, 1.0),
    "mars.gamma": (0.025, 0.5),
    "mars.beta1": (0.95, 0.5),
    "grokfast.alpha": (0.9, 0.5),
    "grokfast.lamb": (2.0, 0.5),
    "gradient_noise.eta": (0.01, 1.0),
    "gradient_noise.gamma": (0.55, 2.0),
    "magma.keep": (0.5, 0.9),
    "magma.tau": (2.0, 0.5),
    "magma.smoothing": (0.9, 0.5),
    "magma.beta": (0.9, 0.5),
    "l2.weight_decay": (0.1, 0.0),
    "decay.weight_decay": (0.3, 0.1),
    "lookahead.k": (2, 3),
    "lookahead.alpha": (0.5, 0.9),
    "outer.k": (2, 3),
    "outer.lr": (0.7, 1.2),
    "outer.momentum": (0.6, 0.0),
    "outer.nesterov": (True, False),
    "cautious_decay.weight_decay": (0.3, 0.1),
    "update_floor.floor": (5.0, 2.0),
    "update_floor.rows": (True, False),
    "radial_brake.outward": (0.5, 0.1),
    "radial_brake.inward": (1.0, 0.2),
    "trust_ratio.trust_coefficient": (1.0, 0.3),
    "trust_ratio.eps": (0.0, 2.0),
    "trust_ratio.min_norm": (0.0, 9.0),
    "trust_ratio.max_ratio": (1.0, 0.2),
    "clip_update_rms.max_rms": (0.1, 0.5),
    "ema.decay": (0.9, 0.5),
    "ema.warmup": (True, False),
}
# what acts on all groups at once, or is tried elsewhere with a formula of its own
# of averages, which do not move the weights: see test_average_parts.py and test_schedule_free.py
AVERAGES = {
    "ema_nesterov.beta",
    "ema_nesterov.gamma",
    "gpa.mu_x",
    "gpa.mu_y",
    "lawa.k",
    "lawa.n",
    "ema.every",
    "ema.start",
    "schedule_free.momentum",
    "schedule_free.r",
    "schedule_free.weight_decay_at_y",
    "schedule_free.weight_lr_power",
    "tail_average.every",
    "tail_average.start",
}
EXCHANGE = ("across", "compress", "fragments", "delay", "blend")
TOGETHER = {
    "sam.rho",  # the norm is over all groups: see below
    "sam.adaptive",
    "accumulate.steps",
    "skip_nonfinite.patience",
    "clip_grad_norm.max_norm",
    "clip_grad_norm.norm_type",
    "clip_update_norm.max_norm",
    "lookahead.pullback_momentum",
    "lookahead.slow_dtype",
    "outer.slow_dtype",
    # of an exchange between replicas: see clients/test_replicas.py
    *(f"{part}.{name}" for part in ("lookahead", "outer") for name in EXCHANGE),
    "ema.average_dtype",
    "ema.device",
    "lookahead.device",
    "outer.device",
    "gradient_noise.seed",
    "magma.seed",
    "skip_spikes.sigma",
    *(f"plateau.{name}" for name in ("metric", "factor", "patience", "mode", "threshold", "threshold_mode")),
    *(f"plateau.{name}" for name in ("cooldown", "min_lr", "eps")),
    "skip_spikes.window",
    *(f"monitor.{name}" for name in metaopt.monitor.hyperparameters),
    *(f"zclip.{name}" for name in ("alpha", "z_thresh", "warmup", "mode")),
    *(f"mechanic.{name}" for name in ("s_init", "num_betas", "eps", "weight_decay")),
}
REQUIRED = {"l2": "l2(0.1)", "decay": "decay(0.1)", "clip_grad_value": "clip_grad_value(1.0)"} | {
    "clip_grad_norm": "clip_grad_norm(1.0)",
    "accumulate": "accumulate(1)",
    "skip_nonfinite": "skip_nonfinite(1)",
    "outer": "outer(k=2)",
    "plateau": "plateau('val_loss')",
    "update_floor": "update_floor(5.0)",  # the steps of the test are longer than what its default asks for
}
# from where to where a schedule leads, where the usual range of a share would not act
RANGES = {"clip_grad_norm.norm_type": (1.0, 4.0), "update_floor.floor": (2.0, 6.0), "trust_ratio.min_norm": (5.0, 9.0)}


def stack_text(name: str, base: str = "sgd(lr=0.1, momentum=0.5)", given: str = "") -> str:
    # their own defaults would not act within a short run
    given += {"outer": ", k=2", "zclip": ", warmup=2"}.get(name, "") if given else ""
    wrapper = f"{name}({given})" if given else REQUIRED.get(name, name)
    before = registry.find(name, "wrapper").target.runs_before_base()
    return f"{wrapper} | {base}" if before else f"{base} | {wrapper}"


def start(seed: int) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64))


def gradient(w: torch.Tensor) -> torch.Tensor:
    return w + 0.5 * torch.sin(3 * w)


def train(opt: metaopt.Stack, steps: int = 12) -> list[torch.Tensor]:
    """Make some updates; return the weights at the end and the averages of every parameter, if any is kept."""
    members = [p for entry in opt.param_groups for p in entry["params"]]

    def closure() -> torch.Tensor:
        for p in members:
            p.grad = gradient(p.detach())
        return torch.zeros(())

    for _ in range(steps):
        opt.step(closure)
    found = [p.detach().clone() for p in members]
    if any("averaged" in wrapper.implemented_hooks() for wrapper in opt.wrappers):
        with opt.averaged():
            found += [p.detach().clone() for p in members]
    return found


def test_every_hyperparameter_of_a_wrapper_is_tried() -> None:
    names = {
        f"{entry.name}.{name}"
        for entry in registry.entries("wrapper")
        if entry.origin == "metaopt"
        for name in entry.target.hyperparameters
    }
    assert names == set(APART) | TOGETHER | AVERAGES


@pytest.mark.parametrize("key", sorted(APART))
def test_each_group_follows_its_own_value(key: str) -> None:
    name = key.partition(".")[0]
    first, second = APART[key]
    # random numbers belong to the name of a parameter
    groups = [{"params": [(f"p{i}", start(i))], key: value} for i, value in enumerate((first, second))]
    together = train(metaopt.build(groups, stack_text(name)))
    alone = [
        train(metaopt.build([{"params": [(f"p{seed}", start(seed))], key: value}], stack_text(name)))
        for seed, value in enumerate((first, second))
    ]
    for found, expected in zip(together, [t for pair in zip(*alone, strict=True) for t in pair], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)
    # and the value matters: with the other group's the end is another
    swapped = train(metaopt.build([{"params": [("p1", start(1))], key: first}], stack_text(name)))
    assert not all(torch.equal(a, b) for a, b in zip(swapped, alone[1], strict=True))


def test_sam_climbs_by_each_group_s_rho_along_the_gradient_of_all() -> None:
    x, y = start(0), start(1)
    seen: list[list[torch.Tensor]] = []

    def closure() -> torch.Tensor:
        seen.append([p.detach().clone() for p in (x, y)])
        for p in (x, y):
            p.grad = gradient(p.detach())
        return torch.zeros(())

    groups = [{"params": [x], "sam.rho": 0.1}, {"params": [y], "sam.rho": 0.4}]
    metaopt.build(groups, "sam | sgd(lr=0.1)").step(closure)
    before, climbed = seen
    norm = torch.sqrt(sum((gradient(w) ** 2).sum() for w in before))
    for w, there, rho in zip(before, climbed, (0.1, 0.4), strict=True):
        torch.testing.assert_close(there, w + rho * gradient(w) / norm, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("key", sorted(TOGETHER - {"sam.rho"}))
def test_what_all_groups_share_is_refused_in_one_of_them(key: str) -> None:
    other = {
        "mode": "mean",
        "alpha": 0.5,
        "adaptive": True,
        "pullback_momentum": "reset",
        "slow_dtype": "float32",
        "average_dtype": "float32",
        "device": "cpu",
        "factor": 0.5,
        "across": "replicas",
        "compress": "bfloat16",
        "blend": 0.9,
        "metric": "loss",  # the name that plateau waits for
        "plateau.mode": "max",
        "threshold_mode": "abs",
        **{name: not h.default for name, h in metaopt.monitor.hyperparameters.items() if h.type is bool},
        "tensors": "*",
    }
    name, _, hyperparameter = key.partition(".")
    groups = [{"params": [start(0)]}, {"params": [start(1)], key: other.get(key, other.get(hyperparameter, 3))}]
    with pytest.raises(metaopt.HyperparameterError, match=f"{key}.*acts on all groups"):
        metaopt.build(groups, stack_text(name))


FLOATS = sorted(
    f"{entry.name}.{name}"
    for entry in registry.entries("wrapper")
    if entry.origin == "metaopt"
    for name, hyperparameter in entry.target.hyperparameters.items()
    if hyperparameter.schedulable
    # the averages shown are worked out from the weights with the value of the moment, which a schedule has moved on
    and entry.name not in ("gpa", "schedule_free")
    # gradients that only fall hold no spike, and nothing is recorded here: these parts have files of their own
    and entry.name not in ("zclip", "skip_spikes", "plateau")
    # there is one replica here
    and name not in EXCHANGE
)


@pytest.mark.parametrize("key", FLOATS)
def test_a_schedule_gives_every_update_the_value_of_its_time(key: str) -> None:
    name, _, hyperparameter = key.partition(".")
    low, high = RANGES.get(key, (0.05, 0.95))
    more = ", max_norm=1.0" if hyperparameter == "norm_type" else ""
    scheduled = metaopt.build(
        [x := start(0)], stack_text(name, given=f"{hyperparameter}=linear({low}, {high}, steps=8){more}")
    )
    by_hand = metaopt.build([y := start(0)], stack_text(name, given=f"{hyperparameter}={low}{more}"))
    for t in range(12):
        assert scheduled.param_groups[0][key] == pytest.approx(low + (high - low) * min(t / 8, 1), abs=1e-15)
        by_hand.param_groups[0][key] = low + (high - low) * min(t / 8, 1.0)
        for found, expected in zip(train(scheduled, 1), train(by_hand, 1), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    constant = metaopt.build([start(0)], stack_text(name, given=f"{hyperparameter}={low}{more}"))
    assert not all(torch.equal(a, b) for a, b in zip(train(constant), train(scheduled, 0), strict=True))
    assert torch.allclose(x, y)


@pytest.mark.parametrize("key", sorted(k for k in APART if isinstance(APART[k][0], bool)))
def test_a_switch_comes_from_the_checkpoint_and_is_obeyed(key: str) -> None:
    name, _, hyperparameter = key.partition(".")
    saved = metaopt.build([x := start(0)], stack_text(name, given=f"{hyperparameter}={not APART[key][0]}"))
    loaded = metaopt.build([y := start(0)], stack_text(name, given=f"{hyperparameter}={APART[key][0]}"))
    train(saved, 5)
    with pytest.warns(UserWarning, match=f"from the checkpoint: {key}="):
        loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    y.data.copy_(x)
    for found, expected in zip(train(loaded), train(saved), strict=True):
        assert torch.equal(found, expected)
    assert str(loaded.spec) == str(saved.spec)


@pytest.mark.parametrize(
    ("live", "saved"),
    [
        ("lookahead(k=2)", "lookahead(k=2, pullback_momentum='reset')"),
        ("lookahead(k=2, pullback_momentum='pullback')", "lookahead(k=2)"),
        ("lookahead(k=2, slow_dtype='float32')", "lookahead(k=2)"),
        ("ema(decay=0.9, average_dtype='float32')", "ema(0.9)"),
    ],
)
def test_what_decides_the_state_is_the_live_stack_s_and_the_load_says_so(live: str, saved: str) -> None:
    before = metaopt.build([start(0)], f"sgd(lr=0.1, momentum=0.5) | {saved}")
    train(before, 5)
    opt = metaopt.build([start(0)], f"sgd(lr=0.1, momentum=0.5) | {live}")
    with pytest.warns(UserWarning, match="kept as this stack has it"):
        opt.load_state_dict(copy.deepcopy(before.state_dict()))
    assert str(opt.spec) == f"sgd(lr=0.1, momentum=0.5) | {live}"
    assert [difference.taken for difference in opt.load_report.differences] == ["stack"]
    train(opt, 5)


def test_outer_s_slow_weights_may_be_finer_than_the_model_s() -> None:
    x = torch.nn.Parameter(torch.full((4,), 100.0, dtype=torch.bfloat16))
    opt = metaopt.build([x], "sgd(lr=1.0) | outer(k=1, lr=0.1, momentum=0.0, slow_dtype='float32')")
    for _ in range(10):  # in bfloat16 alone a tenth of 1 is lost beside 100
        x.grad = torch.ones_like(x)
        opt.step()
    slow = opt.state[x]["outer.slow"]
    assert slow.dtype == opt.state[x]["outer.buffer"].dtype == torch.float32
    torch.testing.assert_close(slow, torch.full((4,), 99.0), rtol=1e-3, atol=0)


def test_no_part_claims_a_name_that_another_part_has() -> None:
    claimed: dict[str, str] = {}
    for entry in registry.entries():
        for name in registry.known_as(entry):
            assert claimed.setdefault(name, entry.name) == entry.name, name
            assert name not in registry.names(), name


def test_moments_that_a_bare_checkpoint_lacks_begin_at_zero() -> None:
    x = start(0)
    bare = metaopt.build([x], "sgd(lr=0.1, momentum=0.5)")
    train(bare, 3)
    v = bare.state[x]["momentum_buffer"].clone()
    opt = metaopt.build(
        [y := start(0)], "sgd(lr=0.1, momentum=0.5) | lookahead(k=1, alpha=0.25, pullback_momentum='pullback')"
    )
    y.data.copy_(x)
    with pytest.warns(UserWarning, match="started fresh: lookahead"):
        opt.load_state_dict(copy.deepcopy(bare.state_dict()))
    expected = 0.25 * (0.5 * v + gradient(y.detach()))
    train(opt, 1)
    torch.testing.assert_close(opt.state[y]["momentum_buffer"], expected, rtol=1e-12, atol=1e-15)


def test_a_group_cannot_set_apart_what_acts_on_all_groups() -> None:
    x, y = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = [{"params": [x], "clip_grad_norm.max_norm": 2.0}, {"params": [y]}]
    with pytest.raises(metaopt.HyperparameterError, match="acts on all groups"):
        metaopt.build(groups, "clip_grad_norm(1.0) | sgd(lr=0.1)")
