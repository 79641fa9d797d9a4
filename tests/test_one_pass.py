"""The base's update and rules of elements in one pass over memory: the numbers of the path without the library."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_runs import small_model

import metaopt
from metaopt import Group, Wrapper, anchor, elementwise
from metaopt.engine.fused import postponed
from metaopt.programs import Compiled, kernels
from metaopt.rules import SUMS

if kernels() is None:
    absent = importlib.util.find_spec("metaopt_kernels") is None
    reason = "metaopt-kernels is not installed" if absent else "metaopt-kernels has no library here, or is turned off"
    pytest.skip(reason, allow_module_level=True)

from metaopt_kernels import LENGTH, OF_TENSOR, OPS, TENSOR

SHAPES: list[tuple[int, ...]] = [*((n,) for n in range(71)), (1000,), (70_001,), (300, 257)]
SPECS = [
    "adamw(lr=0.01, weight_decay=0.1)",
    "adam(lr=0.01, weight_decay=0.1, maximize=True) | lookahead(k=2)",
    "sgd(lr=0.1) | ema(0.9)",
    "sgd(lr=0.1, momentum=0.9, nesterov=True) | ema(0.9, start=2, warmup=True) | lookahead(k=2, alpha=0.3)",
    "clip_grad_norm(1.0) | adamw(lr=0.01) | lookahead(k=2) | ema(0.9, every=2)",
    "clip_grad_value(0.5) | adamw | lookahead(k=2) | lookahead(k=3, label='outer')",
]
Built = tuple[list[torch.nn.Parameter], Any]


class Silent(metaopt.Logger):
    """A log that keeps nothing."""

    def open(self, *, step: int, tags: Any, spec: str, hparams: Any) -> None:
        pass

    def scalars(self, step: int, values: Any) -> None:
        pass


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[postponed.PostponedStep]:
    """Return a list of the updates that the library makes."""
    found: list[postponed.PostponedStep] = []
    own = postponed.PostponedStep.make

    def make(self: postponed.PostponedStep) -> None:
        found.append(self)
        own(self)

    monkeypatch.setattr(postponed.PostponedStep, "make", make)
    return found


def trained(
    spec: Any,
    dtype: torch.dtype,
    steps: int = 7,
    change: Callable[[Built, int], None] | None = None,
    shapes: list[tuple[int, ...]] = SHAPES,
) -> Built:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]
    opt = metaopt.build(params, spec)
    for step in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=dtype)
        if change is not None:
            change((params, opt), step)
        opt.step()
    return params, opt


def assert_same(found: Built, expected: Built) -> None:
    for p, q in zip(found[0], expected[0], strict=True):
        assert torch.equal(p, q), p.shape
        own, other = found[1].state[p], expected[1].state[q]
        assert own.keys() == other.keys()
        for key, value in own.items():
            assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", SPECS)
def test_the_library_computes_the_same_bits(
    spec: str, dtype: torch.dtype, made: list[postponed.PostponedStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = trained(spec, dtype)
    assert made or "|" not in spec
    monkeypatch.setattr(postponed, "kernels", lambda: None)
    made.clear()
    expected = trained(spec, dtype)
    assert not made
    assert_same(found, expected)


class Chooses(Wrapper):
    """A rule that chooses by element: it goes with the base in one pass."""

    slow = anchor()

    @elementwise
    @staticmethod
    def act(param: torch.Tensor, slow: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"slow": torch.where(param * slow > 0, param, slow * 0.5)}

    def after_update(self, group: Group) -> None:
        self.act(group)


class Returns(Chooses):
    """A rule that throws the new weights away; what the base keeps goes on."""

    @elementwise
    @staticmethod
    def act(param: torch.Tensor, slow: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"param": slow}


class Norm(Chooses):
    """A rule with a sum, which has other bits in another order."""

    @elementwise
    @staticmethod
    def act(param: torch.Tensor, slow: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"slow": slow + param / (torch.norm(param) + 1.0)}


class Mean(Chooses):
    """A rule with another sum."""

    @elementwise
    @staticmethod
    def act(param: torch.Tensor, slow: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"slow": slow + param * torch.mean(param) + torch.dot(param, slow)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("part", [Chooses, Returns, Norm, Mean])
def test_a_rule_of_an_author_has_the_same_bits(
    part: type[Wrapper], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined: list[bool] = []
    own = postponed.PostponedStep.add

    def add(self: postponed.PostponedStep, *args: Any) -> bool:
        joined.append(own(self, *args))
        return joined[-1]

    monkeypatch.setattr(postponed.PostponedStep, "add", add)
    # a mean over nothing is nan, which equals nothing
    shapes = [shape for shape in SHAPES if shape != (0,)]
    found = trained(metaopt.adamw(lr=0.01) | part(), dtype, shapes=shapes)
    assert set(joined) == {part in (Chooses, Returns)}
    monkeypatch.setattr(postponed, "kernels", lambda: None)
    assert_same(found, trained(metaopt.adamw(lr=0.01) | part(), dtype, shapes=shapes))


# the same bits where the sums are exact, as counts are; other sums are added up in another order
ON_UPDATE = {
    "adamw(lr=0.01) | cautious_decay(0.1)": True,
    "clip_grad_value(0.5) | sgd(lr=0.1, momentum=0.9) | cautious": True,
    "adam(lr=0.01, maximize=True) | cautious | lookahead(k=2) | ema(0.9)": True,
    "adamw(lr=0.01) | clip_update_rms(0.3) | cautious_decay(0.1)": False,
    "clip_grad_norm(1.0) | adamw(lr=0.01) | update_floor(0.5) | radial_brake | cautious_decay(0.1)": False,
    "sgd(lr=0.1) | radial_brake | trust_ratio(0.1) | cautious | update_floor(2.0) | ema(0.9)": False,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", ON_UPDATE)
def test_rules_on_the_update_join_the_base(
    spec: str, dtype: torch.dtype, made: list[postponed.PostponedStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    # the large ones are several batches, and several threads share one
    shapes = [*SHAPES, (16, 1000), (600_000,), *[(70_000,)] * 5]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = trained(spec, dtype, steps=3, shapes=shapes)
    assert len(made) == 2  # all but the first update
    # torch makes the first update, and its sums depend on the number of threads
    again = trained(spec, dtype, 3, lambda _, step: torch.set_num_threads(2 if step else 1), shapes)
    torch.set_num_threads(before)
    if "clip_grad_norm" not in spec:  # as does its norm
        assert_same(found, again)
    monkeypatch.setattr(postponed, "kernels", lambda: None)
    made.clear()
    expected = trained(spec, dtype, steps=3, shapes=shapes)
    assert not made
    if ON_UPDATE[spec]:
        assert_same(found, expected)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    for p, q in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


THREE = "update_floor(0.5) | radial_brake | cautious_decay(0.1)"


@pytest.mark.parametrize(
    ("spec", "passes"),
    [
        # the base adds the sums up, whichever part asks for them
        (f"adamw | {THREE}", [["adam with dots"], ["turn_decay_add"]]),
        ("adamw | update_floor(0.5)", [["adam with dots"], ["mul_add"]]),
        ("adamw | trust_ratio(0.1) | cautious_decay(0.1)", [["adam with dots"], ["mul", "decay_add"]]),
        ("sgd(lr=0.1, momentum=0.9) | cautious_decay(0.1)", [["sgd", "decay_add"]]),
        # behind a decay the update is another one: it is added up as it comes out
        ("adamw | cautious_decay(0.1) | update_floor(0.5)", [["adam", "mul_le", "addcmul", "dots"], ["mul_add"]]),
    ],
)
def test_a_pass_has_as_few_loops_as_its_operations_allow(
    spec: str, passes: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Compiled] = []

    def compiled(*args: Any, **kwargs: Any) -> Compiled:
        made.append(Compiled(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(postponed, "Compiled", compiled)
    trained(spec, torch.float32, steps=2)
    assert loops(made[-1]) == passes


def loops(compiled: Compiled) -> list[list[str]]:
    """Return the operations on elements of each pass."""
    code = compiled.program.code
    found: list[list[str]] = [[]]
    for i in range(0, len(code), LENGTH):
        name, is_number = OPS[code[i]], code[i + 1] >> 20 == OF_TENSOR >> 20
        if name == "pass":
            found.append([])
        elif name == "dots" and found[-1] == ["adam"] and list(code[i + 2 : i + 4]) == [TENSOR, code[i - LENGTH + 1]]:
            found[-1] = ["adam with dots"]  # of the weights and of what comes out
        elif not is_number or name in {*SUMS, "dots"}:
            found[-1].append(name)
    return found


class Looks(metaopt.Wrapper):
    """A part with a rule that also looks at the update itself: it must see all of it."""

    @elementwise
    @staticmethod
    def halve(update: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"update": update * 0.5}

    def on_update(self, group: Group) -> None:
        self.halve(group)
        torch._foreach_mul_(group.update, 0.5)


def test_a_part_that_looks_at_the_update_is_called_with_it(made: list[postponed.PostponedStep]) -> None:
    found = trained(metaopt.sgd(lr=0.1) | Looks() | metaopt.cautious_decay(0.1), torch.float32)
    assert not made
    expected = trained("sgd(lr=0.025)", torch.float32, steps=1)
    once = trained(metaopt.sgd(lr=0.1) | Looks(), torch.float32, steps=1)
    for p, q in zip(once[0], expected[0], strict=True):
        torch.testing.assert_close(p, q)
    assert found[0][3].isfinite().all()


class Keeps(metaopt.Wrapper):
    """A rule on the update with a tensor of its own, as a momentum of updates."""

    mean = metaopt.zeros()

    @elementwise
    @staticmethod
    def act(update: torch.Tensor, mean: torch.Tensor, param: torch.Tensor) -> dict[str, torch.Tensor]:
        new = torch.lerp(mean, update, 0.25)
        return {"update": torch.where(new * param > 0, new, update * torch.norm(param)), "mean": new}

    def on_update(self, group: Group) -> None:
        self.act(group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rule_on_the_update_may_keep_a_tensor(
    dtype: torch.dtype, made: list[postponed.PostponedStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = metaopt.adamw(lr=0.01) | Keeps() | metaopt.trust_ratio(0.1)
    found = trained(spec, dtype)
    assert made
    monkeypatch.setattr(postponed, "kernels", lambda: None)
    expected = trained(spec, dtype)
    tolerance = 5e-6 if dtype == torch.float32 else 1e-12
    for p, q in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(
            found[1].state[p]["keeps.mean"], expected[1].state[q]["keeps.mean"], rtol=tolerance, atol=tolerance
        )


class FromBefore(Wrapper):
    """A rule that keeps the weights from before the update, which the same pass writes."""

    kept = metaopt.zeros()

    @elementwise
    @staticmethod
    def keep(param: torch.Tensor, kept: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"kept": param}

    def on_update(self, group: Group) -> None:
        self.keep(group)


class Shifts(Wrapper):
    """Two rules: one copies a tensor that the next one changes."""

    slow, older = anchor(), metaopt.zeros()

    @elementwise
    @staticmethod
    def shift(slow: torch.Tensor, older: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"older": slow}

    @elementwise
    @staticmethod
    def follow(param: torch.Tensor, slow: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"slow": torch.lerp(slow, param, 0.5)}

    def after_update(self, group: Group) -> None:
        self.shift(group)
        self.follow(group)


class Shows(Wrapper):
    """Two rules: the weights become a tensor that the next rule changes."""

    slow = anchor()

    @elementwise
    @staticmethod
    def show(param: torch.Tensor, slow: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"param": slow}

    @elementwise
    @staticmethod
    def grow(slow: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"slow": slow * 1.5}

    def after_update(self, group: Group) -> None:
        self.show(group)
        self.grow(group)


@pytest.mark.parametrize("base", [metaopt.adamw, metaopt.sgd(lr=0.1)])
@pytest.mark.parametrize("part", [FromBefore, Shifts, Shows])
def test_a_tensor_that_another_one_becomes_is_read_before_it_is_written(
    part: type[Wrapper], base: Any, made: list[postponed.PostponedStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = trained(base | part(), torch.float32)
    assert made
    monkeypatch.setattr(postponed, "kernels", lambda: None)
    assert_same(found, trained(base | part(), torch.float32))


def swapped(built: Built, step: int) -> None:
    """Give a moment and a parameter other memory, as programs do that move state to another device and back."""
    params, opt = built
    if step == 3:
        opt.state[params[-1]]["exp_avg"].data = opt.state[params[-1]]["exp_avg"].double().float()
        params[-2].data = params[-2].data.clone()


def turned(built: Built, step: int) -> None:
    if step == 3:
        params, opt = built
        entry = opt.state[params[-1]]
        entry["lookahead.slow"].data = entry["lookahead.slow"].t().contiguous().t()


def missing(built: Built, step: int) -> None:
    if step % 3 == 2:
        built[0][-1].grad = None


def frozen(built: Built, step: int) -> None:
    built[0][40].requires_grad_(requires_grad=step < 3)
    if step >= 3:
        built[0][40].grad = None


def sparse(built: Built, step: int) -> None:
    p = built[0][-1]
    if step == 4:
        p.grad = torch.ones_like(p).to_sparse()


@pytest.mark.parametrize("change", [swapped, turned, missing, frozen])
def test_whatever_changes_between_two_updates_is_seen(
    change: Callable[[Built, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = "clip_grad_norm(1.0) | adamw(lr=0.01) | lookahead(k=2) | ema(0.9)"
    found = trained(spec, torch.float32, change=change)
    monkeypatch.setattr(postponed, "kernels", lambda: None)
    assert_same(found, trained(spec, torch.float32, change=change))


def test_a_sparse_gradient_and_16_bits_take_torch_s_path(made: list[postponed.PostponedStep]) -> None:
    trained("sgd(lr=0.1) | ema", torch.float32, steps=5, change=sparse)
    assert len(made) == 3  # neither the first update nor the sparse one
    made.clear()
    trained("adamw | lookahead(k=2)", torch.bfloat16)
    assert not made


@pytest.mark.parametrize("number", [6, 100])
def test_many_small_tensors_are_one_call_without_any_rule(number: int, made: list[postponed.PostponedStep]) -> None:
    trained("adamw", torch.float32, steps=4, shapes=[(4, 2)] * number)
    assert len(made) == (3 if number == 100 else 0)


def test_versions_count_the_updates_of_the_library(made: list[postponed.PostponedStep]) -> None:
    def versions(built: Built) -> list[int]:
        return [t._version for p in built[0] for t in (p, *built[1].state[p].values())]

    built = trained("adamw | lookahead(k=1)", torch.float32, steps=3)
    before = versions(built)
    made.clear()
    built[1].step()
    assert made
    assert all(a > b for a, b in zip(versions(built), before, strict=True))


def test_a_graph_that_needs_the_old_weights_is_refused() -> None:
    model = small_model()
    opt = metaopt.build(model, "adamw | lookahead(k=1)")
    for _ in range(2):
        model(torch.ones(2, 3)).sum().backward()
        opt.step()
    loss = model(torch.ones(2, 3)).sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_profiler_sees_torch_s_kernel(made: list[postponed.PostponedStep]) -> None:
    _, opt = trained("adamw | lookahead(k=1)", torch.float32, steps=3)
    made.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
    assert not made
    assert any("_fused_adamw_" in event.name for event in profile.events())


def test_a_wrapper_behind_the_base_reads_the_gradients_that_the_base_used(made: list[postponed.PostponedStep]) -> None:
    seen: list[torch.Tensor] = []

    class Reader(metaopt.Wrapper):
        def after_update(self, group: Any) -> None:
            seen.append(group.grads[0].clone())

    p = torch.nn.Parameter(torch.ones(1 << 18))
    opt = metaopt.build([p], metaopt.clip_grad_norm(1.0) | metaopt.adamw | Reader(label="reader"))
    for _ in range(3):
        p.grad = torch.full((1 << 18,), 2.0)
        opt.step()
    assert made
    assert all(torch.allclose(gradient, torch.full((1 << 18,), 2.0**-9)) for gradient in seen)


class Raises(torch.optim.SGD):
    """SGD that raises in its third step."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        if self.steps == 3:
            raise ArithmeticError
        return super().step(closure)


def test_what_the_first_base_of_a_failed_update_has_done_stays_with_and_without_the_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends = []
    for library in (kernels, lambda: None):
        monkeypatch.setattr(postponed, "kernels", library)
        parts = metaopt.partition({"0.*": "adamw(lr=0.1) | lookahead(k=1)", "*": Raises})
        model = small_model()
        opt = metaopt.build(model, parts)
        for step in range(3):
            for p in model.parameters():
                p.grad = torch.full_like(p, step + 1.0)
            if step < 2:
                opt.step()
        with pytest.raises(ArithmeticError):
            opt.step()
        ends.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("behind", [[], [metaopt.ema]])
def test_a_part_that_only_looks_sees_the_norm_of_clipped_gradients(
    behind: list[Callable[[], Any]], made: list[postponed.PostponedStep]
) -> None:
    norms: list[float] = []

    class Looks(metaopt.Wrapper):
        observes = True

        def looks_ahead(self) -> bool:
            return True

        def observe(self, groups: metaopt.Groups) -> None:
            norms.append(float(groups.norm()))

    p = torch.nn.Parameter(torch.zeros(1 << 17))
    spec = [metaopt.clip_grad_norm(0.1), metaopt.adamw(lr=0.1), *(part() for part in behind), Looks()]
    opt = metaopt.build([p], spec, log=Silent(), log_every=2)
    for _ in range(4):
        p.grad = torch.ones_like(p)
        opt.step()
    assert made and len(norms) > 2
    assert norms == pytest.approx([0.1] * len(norms), rel=1e-4)


@pytest.mark.parametrize("spec", ["adamw(lr=0.1)", "clip_grad_norm(0.1) | sgd(lr=0.1, momentum=0.9)"])
def test_parameters_that_shrink_where_they_are_are_updated_as_without_the_library(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> list[torch.Tensor]:
        memory = [torch.randn(12, generator=torch.Generator().manual_seed(i)) for i in range(30)]
        params = [torch.nn.Parameter(m.clone()) for m in memory]
        opt = metaopt.build(params, spec)
        for step in range(6):
            if step == 3:
                for p in params:
                    p.data, p.grad = p.data[:5], None
                    for key, value in opt.state[p].items():
                        if key != "step":
                            opt.state[p][key] = value[:5].clone()
            for i, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            opt.step()
        return [p.detach().clone() for p in params]

    found = run()
    monkeypatch.setattr("metaopt.engine.step.base_step.kernels", lambda: None)
    assert all(map(torch.equal, found, run()))


def test_a_slot_that_somebody_has_emptied_is_an_error_of_python() -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(30)]
    opt = metaopt.build(params, "adamw(lr=0.1) | lookahead(k=1)")

    def step() -> None:
        for p in params:
            p.grad = torch.ones(3)
        opt.step()

    step()
    step()
    opt.state[params[3]]["lookahead.slow"] = None
    with pytest.raises((TypeError, AttributeError)):
        step()


def test_an_update_in_inference_mode_does_not_spoil_those_after_it() -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(30)]
    opt = metaopt.build(params, "adamw(lr=0.1)")
    for step in range(6):
        for p in params:
            p.grad = torch.ones(3)
        with torch.inference_mode(step == 2):
            opt.step()
    assert all(float(opt.state[p]["step"]) == 6.0 for p in params)
