"""Rules of elements over flat memory, as an accelerator runs them, against the calls that a processor makes."""

from typing import Any

import pytest
import torch
from accelerated import take_for_accelerator

import metaopt
from metaopt import Group, Wrapper, elementwise, flat_memory, flat_rules, hyper, scalar, zeros
from metaopt.flat_memory import CHUNK
from metaopt.flat_padding import ANYTHING, FINITE, behind_tensors
from metaopt.registry import registry
from metaopt.rules import Rule, rules_of
from metaopt.specs.pipeline import as_pipeline

SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (CHUNK + 1,), (3, 5), (2 * CHUNK,), (4, 0, 2), (33, 40)]


class Counted(Wrapper):
    """Sums of what is 1, or not even a number, where all tensors are 0; and what a rule may do beside."""

    size: float = hyper(0.5)
    kept = zeros()

    @elementwise
    def act(update, grad, param, kept, *, size, lr):  # type: ignore[no-untyped-def]
        share = torch.mean((update * param <= 0) & (grad > -1.0))
        angles = torch.mean(torch.where(torch.abs(grad) > 0, update / grad, 0.0))
        ones = torch.norm(torch.sqrt(1 + torch.square(grad))) + torch.dot(torch.reciprocal(grad) * grad, grad / grad)
        ones = ones + torch.norm(update)
        chosen = torch.where(grad > size, torch.hypot(update, grad * lr), torch.clamp(update, min=-1.0))
        reach = torch.where(share > size, 1.0, torch.hypot(share, ones)) * 2 / (1 + ones) - angles * 1e-3 * lr
        chosen = torch.lerp(chosen, update, share * 0.1) + torch.addcmul(grad, update, reach) * lr
        return {"update": chosen * reach, "kept": torch.lerp(kept, torch.reciprocal(2 + chosen * chosen), 0.3)}

    def on_update(self, group: Group) -> None:
        self.act(group)


class Behind(Wrapper):
    """A rule that writes the weights, of which each element has neighbours that are padding."""

    near: float = hyper(0.1)

    @elementwise
    def snap(param, *, near):  # type: ignore[no-untyped-def]
        return {"param": torch.where(torch.abs(param) < near, param * 0.5, param + 1e-3 * torch.norm(param - 1))}

    def after_update(self, group: Group) -> None:
        self.snap(group)


class Shifts(Wrapper):
    """A rule that makes ones of the zeros behind tensors."""

    @elementwise
    def shift(update):  # type: ignore[no-untyped-def]
        return {"update": update + torch.where(update > 1e30, update, 1e-3)}

    def on_update(self, group: Group) -> None:
        self.shift(group)


class Crosses(Wrapper):
    """A rule of which each output comes from the other's list."""

    kept = zeros()

    @elementwise
    def cross(update, kept):  # type: ignore[no-untyped-def]
        return {
            "update": torch.where(kept > 0, kept * 0.1, 1e-3 + kept),
            "kept": torch.where(update > 0, update, 2 * update),
        }

    def on_update(self, group: Group) -> None:
        self.cross(group)


class Scored(Wrapper):
    """A rule with a number of each tensor among its lists."""

    score = scalar(0.5, per="parameter")

    @elementwise
    def weigh(update, score):  # type: ignore[no-untyped-def]
        return {"update": torch.where(update > 0, update * score, update)}

    def on_update(self, group: Group) -> None:
        self.weigh(group)


class Chooses(Wrapper):
    """A rule whose condition is wider than what it chooses from, and with numbers in the first place."""

    kept = zeros()

    @elementwise
    def choose(update, grad, kept):  # type: ignore[no-untyped-def]
        return {"kept": torch.where(update > 0, 0.9 * grad, 1e-8 + kept), "update": 0.7 * update}

    def on_update(self, group: Group) -> None:
        self.choose(group)


BUILT_IN = [
    *("cautious", "cautious_decay", "clip_update_rms", "radial_brake(outward=0.3, inward=0.2)", "update_floor(0.38)"),
    *("trust_ratio", "trust_ratio(0.001, eps=1e-3, min_norm=0.1, max_ratio=0.8)", "hyperball"),
    *("update_floor(rows=True)", "lookahead(k=2)", "ema(0.9, warmup=True)"),
]
OWN: dict[str, list[type[Wrapper]]] = {
    "counted": [Counted],
    "behind": [Behind],
    "shifts": [Shifts, Counted],
    "crosses": [Crosses],
    "scored": [Scored],
    "chooses": [Chooses],
}
BASES = ["adamw(lr=0.01)", "adamw(lr=0.01, fused=False)", "sgd(lr=0.1, momentum=0.9, maximize=True)", "muon(lr=0.01)"]


def stack_of(name: str, base: str) -> Any:
    if name not in OWN:
        return f"{base} | {name}"
    pipeline: Any = as_pipeline(base)
    for part in OWN[name]:
        pipeline = pipeline | part()
    return pipeline


def trained(pipeline: Any, dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    opt = metaopt.build(params, pipeline)
    for _ in range(4):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        opt.step()
    kept = [v for state in opt.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return [t.detach().clone() for t in (*params, *kept)]


@pytest.fixture
def flat_runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list of the rules that were run over flat memory, as if the processor were an accelerator."""
    ran: list[Any] = []
    own = flat_rules.run

    def run(graph: Any, *args: Any) -> None:
        ran.append(graph)
        own(graph, *args)

    monkeypatch.setattr(flat_rules, "run", run)
    take_for_accelerator(monkeypatch)
    return ran


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", [*BUILT_IN, *OWN])
def test_flat_memory_computes_what_a_processor_computes(
    name: str, base: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    shapes = [shape for shape in SHAPES if len(shape) == 2] if "muon" in base else SHAPES
    cases = [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 2e-2)]
    monkeypatch.setenv("METAOPT_KERNELS", "0")
    expected = [trained(stack_of(name, base), dtype, shapes) for dtype, _ in cases]
    ran = request.getfixturevalue("flat_runs")
    for (dtype, near), known in zip(cases, expected, strict=True):
        for found, other in zip(trained(stack_of(name, base), dtype, shapes), known, strict=True):
            torch.testing.assert_close(found, other, rtol=near, atol=near, equal_nan=False)
    by_foreach = name.partition("(")[0] in ("lookahead", "ema", "scored") or "rows" in name
    assert bool(ran) is not by_foreach


# ---- what is behind the tensors


def behind(rule: Rule) -> Any:
    symbol = next(iter(rule.graph.outputs.values()))
    return behind_tensors(rule.graph)[symbol]


def of(function: Any) -> Rule:
    return Rule(function)


def test_it_is_known_what_a_rule_makes_of_zeros() -> None:
    assert behind(of(lambda update, param, *, lr: {"update": (update * param <= 0) * lr})) == FINITE
    assert behind(of(lambda update, param, *, lr: {"update": (update * param < 0) * lr})) == 0.0
    assert behind(of(lambda update, param, *, lr: {"update": torch.addcmul(update, param, update + lr)})) == 0.0
    assert behind(of(lambda update, *, lr: {"update": update / (torch.sqrt(update * update) + lr)})) == ANYTHING
    assert behind(of(lambda update, *, lr: {"update": (update - lr) * 0.0})) == 0.0
    assert behind(of(lambda update: {"update": torch.reciprocal(update) * update})) == ANYTHING
    assert behind(of(lambda update: {"update": torch.where(update > 0, 1 / update, update)})) == 0.0
    assert behind(of(lambda update: {"update": torch.sqrt(4 + update)})) == 2.0
    assert behind(of(lambda update: {"update": update * torch.norm(update)})) == 0.0
    assert behind(of(lambda update, *, lr: {"update": torch.lerp(update, update * lr, lr)})) == 0.0
    assert behind(of(lambda update: {"update": update / torch.norm(update)})) == ANYTHING


def test_built_in_rules_leave_the_zeros_behind_an_update() -> None:
    names = ("cautious", "cautious_decay", "clip_update_rms", "radial_brake", "update_floor", "trust_ratio")
    for name in names:
        for rule in rules_of(registry.find(name, "wrapper").target):
            assert behind(rule) == 0.0, name


def test_what_is_no_number_in_one_tensor_stays_there(flat_runs: list[Any]) -> None:
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in [(3, 5), (CHUNK + 1,), (7,)]]
    opt = metaopt.build(params, "adamw(lr=0.1) | cautious | radial_brake | trust_ratio | cautious_decay")
    for p in params:
        p.grad = torch.ones_like(p)
    params[1].grad[-1] = torch.nan
    opt.step()
    assert len(flat_runs) == 4
    assert torch.isfinite(params[0]).all() and torch.isfinite(params[2]).all()
    assert torch.isnan(params[1]).all()


# ---- which rules, in how many parts


def test_a_rule_that_torch_has_multi_tensor_calls_for_is_left_to_them() -> None:
    for name, one_by_one in {"lookahead": False, "ema": False, "cautious_decay": True, "trust_ratio": True}.items():
        rules = rules_of(registry.find(name, "wrapper").target)
        assert rules and {flat_rules.is_one_by_one(rule.graph) for rule in rules} == {one_by_one}


def test_complex_weights_are_updated_as_on_a_processor(request: pytest.FixtureRequest) -> None:
    def moved() -> torch.Tensor:
        weights = torch.randn(4, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
        param = torch.nn.Parameter(weights)
        opt = metaopt.build([param], "adamw(lr=0.1) | cautious | clip_update_rms(0.5) | cautious_decay")
        param.grad = torch.full_like(weights, 1 + 2j)
        opt.step()
        return param.detach()

    expected = moved()
    ran = request.getfixturevalue("flat_runs")
    torch.testing.assert_close(moved(), expected)
    assert ran == []


def test_tensors_in_another_order_of_memory_are_gathered_row_by_row(request: pytest.FixtureRequest) -> None:
    def moved() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        weights, gradient = (torch.randn(2, 3, 4, 5, generator=generator) for _ in range(2))
        param = torch.nn.Parameter(weights.to(memory_format=torch.channels_last))
        param.grad = gradient.to(memory_format=torch.channels_last)
        metaopt.build([param], "adamw(lr=0.1) | cautious | radial_brake | cautious_decay").step()
        assert param.is_contiguous(memory_format=torch.channels_last)
        return param.detach()

    expected = moved()
    ran = request.getfixturevalue("flat_runs")
    torch.testing.assert_close(moved(), expected)
    assert len(ran) == 3


def test_large_groups_are_taken_in_parts_of_whole_tensors(
    flat_runs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trained("muon(lr=0.1) | trust_ratio | cautious", torch.float32, [(33, 40), (3, 5), (8, 9), (4, 4)])
    whole = len(flat_runs)
    monkeypatch.setattr(flat_memory, "PART", 100)
    found = trained("muon(lr=0.1) | trust_ratio | cautious", torch.float32, [(33, 40), (3, 5), (8, 9), (4, 4)])
    assert len(flat_runs) - whole == 3 * whole
    torch.testing.assert_close(found, expected)


def test_a_neighbour_in_somebody_s_own_memory_is_no_padding(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Copies of both weights, 512 elements, are one memory that is as long as that of the matrix with its padding."""

    def run() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((16, 16), (CHUNK - 256,))]
        opt = metaopt.build(params, "adamw(lr=0.1) | lookahead(k=5) | hyperball")
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            opt.step()
        return [p.detach().clone() for p in params]

    monkeypatch.setenv("METAOPT_KERNELS", "0")
    expected = run()
    request.getfixturevalue("flat_runs")
    for found, known in zip(run(), expected, strict=True):
        torch.testing.assert_close(found, known, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flat", [False, True])
def test_a_tiny_update_turns_a_matrix_by_the_same_angle(flat: bool, request: pytest.FixtureRequest) -> None:
    if flat:
        request.getfixturevalue("flat_runs")
    p = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    opt = metaopt.build([p], "sgd(lr=0.1) | hyperball")
    p.grad = torch.tensor([[0.0, 1e-20], [0.0, 0.0]])
    opt.step()
    torch.testing.assert_close(p.detach().norm(), torch.tensor(1.0))
    torch.testing.assert_close(p.detach()[0, 1], torch.tensor(-0.1 / 1.01**0.5), rtol=1e-3, atol=0.0)
