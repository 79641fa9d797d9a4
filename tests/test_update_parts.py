"""The parts that act on the base's update, step by step beside their rules in float64."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import reference_updates as rules
import torch

import metaopt

Tensor = torch.Tensor
Base = tuple[str, dict[str, Any]]
Chain = list[tuple[str, dict[str, Any]]]

SHAPES = ((), (1,), (5,), (4, 3), (6, 1), (2, 3, 4), (0,), (3, 0), (3, 3))
ZEROS = len(SHAPES) - 1  # the last one begins at zero
# two values for two groups
PARTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cautious": ({}, {}),
    "cautious_decay": ({"weight_decay": 0.025}, {"weight_decay": 0.4}),
    "hyperball": ({}, {}),
    "update_floor": ({"floor": 0.38}, {"floor": 0.05}),
    "update_floor rows": ({"floor": 0.38, "rows": True}, {"floor": 2.0, "rows": False}),
    "radial_brake": ({}, {"outward": 0.3, "inward": 0.7}),
    "trust_ratio": ({}, {"trust_coefficient": 0.5, "eps": 0.1, "min_norm": 1.5, "max_ratio": 1.2}),
    "clip_update_rms": ({"max_rms": 0.9}, {"max_rms": 0.2}),
}
SGD, ADAMW = ("sgd", {}), ("adamw", {"weight_decay": 0.1})
BASES = [SGD, ("sgd", {"momentum": 0.9}), ("adam", {}), ADAMW]
TORCH = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class Beside:
    """A stack, and its rules applied to what torch's own optimizer would do from the same weights."""

    def __init__(self, base: Base, groups: list[Chain], dtype: torch.dtype = torch.float64, **also: Any) -> None:
        """`groups` has a chain of parts with their hyperparameters for each of two groups."""
        torch.manual_seed(0)
        start = [torch.randn(shape, dtype=dtype) * (i != ZEROS) for i, shape in enumerate(SHAPES)]
        self.groups, self.halves = groups, (range(0, 5), range(5, len(SHAPES)))
        name, given = base
        self.rates = [0.1, 0.02] if name == "sgd" else [0.05, 0.01]
        self.params, self.plain = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
        entries = [
            {"params": [self.plain[i] for i in half], "lr": rate, **also}
            for half, rate in zip(self.halves, self.rates, strict=True)
        ]
        self.torch = TORCH[name](entries, **given)
        own = [
            {"params": [self.params[i] for i in half], "lr": rate, **also}
            | {f"{part.split()[0]}.{key}": value for part, values in chain for key, value in values.items()}
            for half, rate, chain in zip(self.halves, self.rates, groups, strict=True)
        ]
        text = f"{name}({', '.join(f'{key}={value}' for key, value in given.items())})"
        self.spec = " | ".join([text, *(part.split()[0] for part, _ in groups[0])])
        self.opt = metaopt.build(own, self.spec)

    def gradient(self, i: int, number: int, w: Tensor) -> Tensor | None:
        """Return a gradient that is missing now and then, and zero in the second group at one step."""
        if (i + number) % 4 == 3:
            return None
        generator = torch.Generator().manual_seed(100 * number + i)
        noise = torch.randn(w.shape, generator=generator, dtype=w.dtype)
        return torch.zeros_like(w) if number == 2 and i >= 5 else 0.3 * w.detach() + noise

    def advance(self, number: int) -> None:
        """Step the stack alone."""
        for i, p in enumerate(self.params):
            p.grad = self.gradient(i, number, p)
        self.opt.step()

    def step(self, number: int) -> None:
        """Step the stack, and the weights beside it by the rules."""
        self.advance(number)
        for i, p in enumerate(self.plain):
            p.grad = self.gradient(i, number, p)
        before = [p.detach().clone() for p in self.plain]
        self.torch.step()
        for chain, half, rate in zip(self.groups, self.halves, self.rates, strict=True):
            for i in half:
                p, w, g = self.plain[i], before[i], self.plain[i].grad
                if g is None:
                    assert torch.equal(p, w)
                    continue
                update = p.detach() - w
                for part, given in chain:
                    kwargs = {"maximize": True} if self.opt.param_groups[0]["maximize"] and part == "cautious" else {}
                    update = getattr(rules, part.split()[0])(w, update, g, lr=rate, **given, **kwargs)
                p.data = w + update

    def assert_alike(self, **tolerance: float) -> None:
        for i, (own, plain) in enumerate(zip(self.params, self.plain, strict=True)):
            torch.testing.assert_close(
                own.detach(), plain.detach(), **tolerance, msg=lambda text, i=i: f"{self.spec}, {SHAPES[i]}: {text}"
            )


EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_a_part_follows_its_paper_at_every_step(part: str, base: Base, maximize: bool) -> None:
    trial = Beside(base, [[(part, given)] for given in PARTS[part]], maximize=maximize)
    for number in range(8):
        trial.step(number)
        trial.assert_alike(**EXACT)


@pytest.mark.parametrize("base", BASES, ids=str)
def test_several_parts_act_on_one_update_in_written_order(base: Base) -> None:
    chains: list[Chain] = [
        [(part, PARTS[part][i]) for part in ("update_floor", "radial_brake", "cautious_decay", "trust_ratio")]
        for i in range(2)
    ]
    results = []
    for order in (chains, [chain[::-1] for chain in chains]):
        trial = Beside(base, order)
        for number in range(6):
            trial.step(number)
            trial.assert_alike(**EXACT)
        results.append(trial.params[3].detach())
    assert not torch.allclose(*results, rtol=1e-6)  # the order is part of the rule


@pytest.mark.parametrize("part", PARTS)
def test_a_complex_parameter_is_a_field_of_arrows(part: str) -> None:
    trial = Beside(SGD, [[(part, given)] for given in PARTS[part]], torch.complex128)
    for number in range(5):
        trial.step(number)
        trial.assert_alike(**EXACT)


@pytest.mark.parametrize("maximize", [False, True])
def test_the_global_norm_of_an_update_is_clipped_over_all_groups(maximize: bool) -> None:
    trial = Beside(("adam", {}), [[("clip_update_norm", {})]] * 2, maximize=maximize)
    clipped = set()
    for number in range(6):
        trial.opt.param_groups[0]["clip_update_norm.max_norm"] = bound = 0.05 if number % 2 else 50.0
        trial.opt.param_groups[1]["clip_update_norm.max_norm"] = bound
        before = [p.detach().clone() for p in trial.plain]
        trial.groups = [[], []]
        trial.step(number)
        updates = [p.detach() - w for p, w in zip(trial.plain, before, strict=True)]
        expected = rules.clip_update_norm(updates, max_norm=bound)
        clipped.add(expected is not updates)
        for p, w, u in zip(trial.plain, before, expected, strict=True):
            p.data = w + u
        trial.assert_alike(**EXACT)
    assert clipped == {False, True}


LINE = "muon(lr=0.02) | update_floor(0.38) | radial_brake | cautious_decay(0.025)"


def test_the_line_of_a_speedrun_follows_its_rules() -> None:
    generator = torch.Generator().manual_seed(0)
    start = {f"layer.{i}": torch.randn(4, 6, generator=generator, dtype=torch.float64) for i in range(3)}
    start["bias"] = torch.randn(6, generator=generator, dtype=torch.float64)
    own, plain = ({name: torch.nn.Parameter(w.clone()) for name, w in start.items()} for _ in range(2))
    opt = metaopt.build(list(own.items()), f"partition({{'layer.*': {LINE}, '*': adamw(lr=0.01)}})")
    muon = torch.optim.Muon([plain[name] for name in start if name != "bias"], lr=0.02)
    adamw = torch.optim.AdamW([plain["bias"]], lr=0.01)
    for _ in range(6):
        for name in start:
            noise = torch.randn(start[name].shape, generator=generator, dtype=torch.float64)
            for params in (own, plain):
                params[name].grad = params[name].detach() + noise
        opt.step()
        before = {name: p.detach().clone() for name, p in plain.items()}
        muon.step()
        adamw.step()
        for name, w in before.items():
            if name == "bias":
                continue
            u, g = plain[name].detach() - w, plain[name].grad
            u = rules.update_floor(w, u, g, lr=0.02, floor=0.38)
            u = rules.radial_brake(w, u, g, lr=0.02)
            u = rules.cautious_decay(w, u, g, lr=0.02, weight_decay=0.025)
            plain[name].data = w + u
        for name in start:
            torch.testing.assert_close(own[name].detach(), plain[name].detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("part", [*PARTS, "clip_update_norm"])
def test_a_part_keeps_nothing_and_resumes_bit_for_bit(part: str) -> None:
    chains: list[Chain] = [[(part, given)] for given in PARTS.get(part, ({}, {}))]
    whole, first, second = (Beside(ADAMW, chains) for _ in range(3))
    for number in range(6):
        whole.advance(number)
        (first if number < 3 else second).advance(number)
        if number == 2:
            for old, new in zip(first.params, second.params, strict=True):
                new.data = old.detach().clone()
            second.opt.load_state_dict(copy.deepcopy(first.opt.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(whole.params, second.params, strict=True))
    held = whole.opt.state_dict()["state"]
    assert held
    assert all(set(entries) == {"step", "exp_avg", "exp_avg_sq"} for entries in held.values())


@pytest.mark.parametrize("part", PARTS)
def test_in_sixteen_bits_a_part_is_off_by_one_rounding(part: str) -> None:
    given = PARTS[part][0]
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(8, 16, generator=generator).bfloat16()
    p = torch.nn.Parameter(start.clone())
    opt = metaopt.build([p], _stack("sgd(lr=0.1)", part, given))
    p.grad = torch.randn(8, 16, generator=generator).bfloat16()
    # torch computes the base's step in 16 bits: that is the update that the part gets
    plain = torch.nn.Parameter(start.clone())
    plain.grad = p.grad.clone()
    torch.optim.SGD([plain], lr=0.1).step()
    opt.step()
    w = start.double()
    u = getattr(rules, part.split()[0])(w, plain.detach().double() - w, p.grad.double(), lr=0.1, **given)
    assert p.dtype == torch.bfloat16
    torch.testing.assert_close(p.detach().double(), w + u, rtol=2.0**-8, atol=1e-4)
    assert (p.detach() != start).any()


def _stack(base: str, part: str, given: dict[str, Any]) -> str:
    return f"{base} | {part.split()[0]}({', '.join(f'{key}={value!r}' for key, value in given.items())})"


@pytest.mark.parametrize("part", ["cautious", "cautious_decay(0.5)"])
def test_signs_are_compared_where_the_product_is_zero_in_sixteen_bits(part: str) -> None:
    # 2^-14 * 2^-14 is below every number of 16 bits in torch.float16
    small = 2.0**-14
    p = torch.nn.Parameter(torch.full((4,), small, dtype=torch.float16))
    opt = metaopt.build([p], f"sgd(lr=0.5) | {part}")
    p.grad = torch.tensor([small, small, -small, -small], dtype=torch.float16)
    opt.step()
    if part == "cautious":
        assert p.tolist() == [small / 2, small / 2, small * 1.5, small * 1.5]
    else:
        assert p.tolist() == [small / 4, small / 4, small * 1.5, small * 1.5]


def test_the_defaults_make_a_stack_that_learns() -> None:
    p = torch.nn.Parameter(torch.full((4, 4), 2.0, dtype=torch.float64) + torch.eye(4, dtype=torch.float64))
    opt = metaopt.build([p], "adamw(lr=0.02) | update_floor | radial_brake | cautious_decay")
    losses = []
    for _ in range(200):
        p.grad = p.detach() - 1.0
        losses.append(float((p.detach() - 1.0).square().sum()))
        opt.step()
    assert losses[-1] < losses[0] / 2


def test_hyperball_keeps_the_size_of_a_matrix_and_turns_it_by_the_rate() -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(20, 30))
    size, lr = float(p.detach().double().norm()), 0.05
    opt = metaopt.build([p], f"adam(lr={lr}) | hyperball")
    for _ in range(300):
        p.grad = torch.randn(20, 30)
        before = p.detach().double()
        opt.step()
        now = p.detach().double()
        cosine = float((now * before).sum() / now.norm() / before.norm())
        assert cosine == pytest.approx(1 / (1 + lr**2) ** 0.5, abs=1e-3)  # a step at nearly right angles
    assert float(p.detach().double().norm()) == pytest.approx(size, rel=1e-5)


def test_the_radial_brake_halves_a_growth_and_passes_a_shrinkage() -> None:
    for gradient, end in ((-10.0, 2.5), (5.0, 1.5)):
        p = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        opt = metaopt.build([p], "sgd(lr=0.1) | radial_brake")
        p.grad = torch.tensor(gradient, dtype=torch.float64)
        opt.step()
        assert p.item() == pytest.approx(end, abs=1e-15)
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(10, 10, dtype=torch.float64))
    size = float(p.detach().norm())
    opt = metaopt.build([p], "sgd(lr=0.5) | radial_brake")
    for _ in range(20):  # along tangents alone: the size stays, where the base would have it grow
        g = torch.randn(10, 10, dtype=torch.float64)
        p.grad = g - (g * p.detach()).sum() / p.detach().square().sum() * p.detach()
        opt.step()
    assert float(p.detach().norm()) == pytest.approx(size, rel=1e-12)


def train(params: list[Tensor], opt: Any, steps: int = 5) -> list[Tensor]:
    """Return the weights after steps on a quadratic with noise, the same for every optimizer."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        for p in params:
            p.grad = 0.5 * p.detach() + torch.randn(p.shape, generator=generator, dtype=p.dtype)
        opt.step()
    return [p.detach().clone() for p in params]


def made(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(2)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def compare(
    base: Callable[..., torch.optim.Optimizer],
    spec: str,
    other: Callable[..., torch.optim.Optimizer],
    shapes: tuple[tuple[int, ...], ...],
    tolerance: float,
    dtype: torch.dtype = torch.float64,
) -> None:
    params, theirs = made(shapes, dtype), made(shapes, dtype)
    ours = train(params, metaopt.wrap(base(params), spec))
    bare = made(shapes, dtype)
    plain = train(bare, base(bare))
    for own, expected, unwrapped in zip(ours, train(theirs, other(theirs)), plain, strict=True):
        torch.testing.assert_close(own, expected, rtol=tolerance, atol=tolerance)
        assert len(own.shape) < 2 or not torch.allclose(own, unwrapped, rtol=1e-4)


MATRICES = ((4, 3), (3, 5))


def test_over_its_adam_a_trust_ratio_is_pytorch_optimizer_s_lamb() -> None:
    lamb = pytest.importorskip("pytorch_optimizer").Lamb
    given = {"lr": 0.01, "eps": 1e-6, "weight_decay": 0.1, "weight_decouple": False, "pre_norm": False}
    given |= {"adam_debias": True}  # its way to say that the rate is not divided by 1 - b1^t
    compare(
        lambda p: lamb(p, adam=True, **given),
        "trust_ratio(eps=1e-6)",
        lambda p: lamb(p, **given),
        ((4, 3), (5,)),
        1e-12,
    )


def test_over_sgd_a_trust_ratio_is_pytorch_optimizer_s_lars() -> None:
    lars = pytest.importorskip("pytorch_optimizer").LARS
    compare(
        lambda p: torch.optim.SGD(p, lr=2.0),
        "trust_ratio(0.001)",
        lambda p: lars(p, lr=2.0, momentum=0.0, weight_decay=0.0, trust_coefficient=0.001),
        MATRICES,
        1e-12,
    )


def test_clipping_by_the_rms_is_pytorch_optimizer_s_adafactor() -> None:
    adafactor = pytest.importorskip("pytorch_optimizer").AdaFactor
    given = {"lr": 0.01, "betas": (None, 0.99), "relative_step": False, "scale_parameter": False}
    compare(
        lambda p: adafactor(p, clip_threshold=1e9, **given),
        "clip_update_rms(0.3)",
        lambda p: adafactor(p, clip_threshold=0.3, **given),
        ((4, 3), (5,)),
        1e-12,
    )


@pytest.mark.parametrize(
    ("spec", "name", "beta", "given"),
    [
        ("hyperball", "HyperBallAdamW", 0.0, {}),  # which has no first moment
        ("cautious_decay(0.3)", "AdamW", 0.9, {"weight_decay": 0.3, "cautious_weight_decay": True}),
        ("cautious", "AdamW", 0.9, {"caution": True}),
    ],
)
def test_a_part_is_what_heavyball_has_built_in(
    spec: str, name: str, beta: float, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    heavyball = pytest.importorskip("heavyball")
    monkeypatch.setattr(heavyball.utils, "compile_mode", None)  # compiling takes minutes, and changes no rule
    compare(
        lambda p: torch.optim.AdamW(p, lr=0.05, betas=(beta, 0.99), weight_decay=0.0),
        spec,
        lambda p: getattr(heavyball, name)(p, lr=0.05, betas=(beta, 0.99), **given),
        ((4, 3), (5,)),
        1e-5,
        torch.float32,
    )
