"""torch.compile(opt.step): equal to eager, and compiled a handful of times, whatever the cycle and the schedule."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_runs import loss_of, small_model, train, weights
from torch._dynamo.utils import counters
from torch.optim.lr_scheduler import CosineAnnealingLR

import metaopt

pytestmark = pytest.mark.slow

STEPS = 60
Make = Callable[[torch.nn.Module], Any]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled_run(make: Make, schedule: Any = None, backend: Any = "inductor", steps: int = STEPS) -> list[torch.Tensor]:
    model = small_model()
    opt = make(model)
    scheduler = schedule and schedule(opt)
    train(model, opt, range(steps), call=torch.compile(opt.step, backend=backend), after=scheduler and scheduler.step)
    return weights(model)


def eager_run(make: Make, schedule: Any = None, steps: int = STEPS) -> list[torch.Tensor]:
    model = small_model()
    opt = make(model)
    scheduler = schedule and schedule(opt)
    train(model, opt, range(steps), after=scheduler and scheduler.step)
    return weights(model)


def torch_s_schedule(opt: torch.optim.Optimizer) -> CosineAnnealingLR:
    return CosineAnnealingLR(opt, STEPS)


def built(spec: str) -> Make:
    return lambda model: metaopt.build(model.named_parameters(), spec, total_steps=STEPS)


def wrapped(**rate: Any) -> Make:
    return lambda model: metaopt.wrap(
        torch.optim.AdamW(model.parameters(), **copy.deepcopy(rate)), "clip_grad_norm(0.5) | lookahead(k=5)"
    )


def compilations() -> int:
    assert not counters["recompile_limit"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize(
    ("make", "schedule"),
    [
        pytest.param(built("clip_grad_norm(0.5) | adamw(lr=warmup(cosine(1e-3), 9), fused=None) | lookahead"), None),
        pytest.param(wrapped(lr=1e-3), torch_s_schedule),
        pytest.param(wrapped(lr=torch.tensor(1e-3)), torch_s_schedule),
    ],
    ids=["schedule of the stack", "torch scheduler, float rate", "torch scheduler, tensor rate"],
)
def test_a_compiled_run_equals_the_eager_one_and_compiles_at_most_four_times(make: Make, schedule: Any) -> None:
    found = compiled_run(make, schedule)
    assert 1 <= compilations() <= 4
    torch.testing.assert_close(found, eager_run(make, schedule), rtol=0, atol=1e-6)


# a compiler of its own costs seconds per case: here the traced graphs are run as they are
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "spec",
    [
        "sgd(lr=cosine(0.1), momentum=0.9, foreach=False) | lookahead(k=5)",
        "sgd(lr=cosine(0.1), momentum=0.9, foreach=True) | lookahead(k=5)",
        "adam(lr=cosine(1e-3), foreach=True) | lookahead(k=5, pullback_momentum='pullback')",
        "adagrad(lr=cosine(0.1), foreach=False) | lookahead(k=5)",
        "clip_grad_value(0.1) | adamw(lr=cosine(1e-3)) | lookahead(k=5) | lookahead(k=10, label='outer')",
    ],
)
def test_no_base_and_no_wrapper_costs_a_compilation_per_cycle_or_per_rate(spec: str) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    found = compiled_run(built(spec), backend=backend)
    assert not counters["recompile_limit"]
    assert len(graphs) <= 4
    torch.testing.assert_close(found, eager_run(built(spec)), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_reset_of_the_base_is_right_though_torch_gives_up_compiling() -> None:
    spec = "adamw(lr=cosine(1e-3), foreach=True) | lookahead(k=5, pullback_momentum='reset')"
    found = compiled_run(built(spec), backend="eager")
    torch.testing.assert_close(found, eager_run(built(spec)), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_hooks_fire_once_per_compiled_step_and_the_rate_stays_a_number() -> None:
    model = small_model()
    opt = metaopt.build(model.named_parameters(), "adamw(lr=cosine(0.01), foreach=True) | lookahead", total_steps=9)
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    train(model, opt, range(6), call=torch.compile(opt.step, backend="eager"))
    assert seen == ["before", "after"] * 6
    assert opt.updates == 6
    assert isinstance(opt.param_groups[0]["lr"], float)
    assert opt.param_groups[0]["foreach"] is True


@pytest.mark.filterwarnings("ignore")
def test_a_closure_is_evaluated_once_per_compiled_step_and_its_loss_returned() -> None:
    runs = []
    for compiled in (True, False):
        model = small_model()
        opt = metaopt.build(model.named_parameters(), "clip_grad_norm(0.5) | adamw(lr=0.01) | lookahead(k=2)")
        step = torch.compile(opt.step, backend="eager") if compiled else opt.step
        losses = []
        for number in range(6):

            def closure(model: torch.nn.Module = model, number: int = number) -> torch.Tensor:
                model.zero_grad()
                loss = loss_of(model, number)
                loss.backward()
                return loss

            losses.append(step(closure).item())
        runs.append((losses, weights(model)))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=1e-6)
    assert not counters["recompile_limit"]


@pytest.mark.filterwarnings("ignore")
def test_a_base_that_raises_while_compiled_leaves_nothing_behind() -> None:
    model = small_model()
    opt = metaopt.build(model.named_parameters(), "clip_grad_norm(0.5) | adamw(lr=0.01) | lookahead(k=2)")
    step = torch.compile(opt.step, backend="eager")
    train(model, opt, range(3), call=step)
    beta = opt.param_groups[0].pop("betas")
    with pytest.raises(KeyError):
        train(model, opt, [3], call=step)
    opt.param_groups[0]["betas"] = beta
    assert opt.param_groups[0]["lr"] == 0.01
    assert not hasattr(opt.base, "grad_scale")
    assert opt.updates == 3
    train(model, opt, [3], call=step)
    assert opt.updates == 4


@pytest.mark.filterwarnings("ignore")
def test_a_step_inside_a_compiled_function_is_the_same_step() -> None:
    model, twin = small_model(), small_model()
    spec = "clip_grad_norm(0.5) | adamw(lr=0.01) | lookahead(k=2)"
    opt, plain = (metaopt.build(m.named_parameters(), spec) for m in (model, twin))

    @torch.compile(fullgraph=False, backend="eager")
    def update() -> None:
        opt.step()

    train(model, opt, range(7), call=update)
    train(twin, plain, range(7))
    torch.testing.assert_close(weights(model), weights(twin), rtol=0, atol=1e-6)


class Halved(torch.optim.Optimizer):
    """Gradient descent whose `step()` takes a keyword: the share of the update that is made."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None, *, share: float = 1.0) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad, alpha=float(group["lr"]) * share)


@pytest.mark.filterwarnings("ignore")
def test_keywords_of_a_compiled_step_reach_the_base() -> None:
    ends = []
    for compiled in (True, False):
        model = small_model()
        opt = metaopt.wrap(Halved(model.parameters()), "clip_grad_norm(0.5)")
        step = torch.compile(opt.step, backend="eager") if compiled else opt.step
        train(model, opt, range(3), call=lambda step=step: step(share=0.5))
        ends.append(weights(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_keyword_that_the_base_does_not_take_is_refused_by_a_compiled_step_too() -> None:
    model = small_model()
    opt = metaopt.build(model.named_parameters(), "adamw(lr=0.01) | lookahead(k=2)")
    step = torch.compile(opt.step, backend="eager")
    train(model, opt, range(2), call=step)
    with pytest.raises(Exception, match="share"):
        train(model, opt, [2], call=lambda: step(share=0.5))
    assert opt.updates == 2


class EverySecond(metaopt.Wrapper, every="k"):
    """Halves every k-th update."""

    k: int = metaopt.hyper(2, ge=1)

    def on_update(self, group: metaopt.Group) -> None:
        for change in group.update:
            change.mul_(0.5)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_that_fails_right_before_the_base_leaves_nothing_behind() -> None:
    model = small_model()
    part = EverySecond()
    parts = metaopt.clip_grad_norm(1e-3) | metaopt.adamw(lr=0.01) | part | metaopt.lookahead(k=2)
    opt = metaopt.build(model.named_parameters(), parts)
    step = torch.compile(opt.step, backend="eager")
    k = opt.param_groups[0].pop(f"{part.label}.k")
    with pytest.raises(KeyError):
        train(model, opt, [0], call=step)
    opt.param_groups[0][f"{part.label}.k"] = k
    assert "grad_scale" not in vars(opt.base)
    train(model, opt, range(3), call=step)
    twin = small_model()
    plain = metaopt.build(twin.named_parameters(), parts)
    train(twin, plain, range(3))
    torch.testing.assert_close(weights(model), weights(twin), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_fused_step_over_gradients_in_other_strides_pairs_them_rightly() -> None:
    ends = []
    for compiled in (True, False):
        p = torch.nn.Parameter(torch.arange(12.0).view(3, 4))
        opt = metaopt.build([p], "adamw(lr=0.01)", exact=not compiled)
        step = torch.compile(opt.step, backend="eager") if compiled else opt.step
        for i in range(3):
            p.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(i)).t()
            step()
        ends.append(p.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_the_rate_that_the_tracer_gets_is_in_main_memory_whatever_the_default_device_is() -> None:
    ends = []
    for default in ("cpu", "meta"):
        model = small_model()
        opt = metaopt.build(model.named_parameters(), "sgd(lr=cosine(0.1), momentum=0.9, foreach=True)", total_steps=9)
        step = torch.compile(opt.step, backend="eager")
        for number in range(4):
            opt.zero_grad()
            loss_of(model, number).backward()
            with torch.device(default):  # where a new tensor has no numbers
                step()
        ends.append(weights(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


class CapturableFromNowOn(torch.optim.AdamW):
    """Sets the flag that torch's tracer sets where all parameters are on CUDA."""

    def _init_group(self, group: Any, *lists: Any) -> Any:
        group["capturable"] = True
        return super()._init_group(group, *lists)


@pytest.mark.filterwarnings("ignore")
def test_a_group_is_capturable_after_a_compiled_step_only_if_it_was_before() -> None:
    model = small_model()
    opt = metaopt.wrap(CapturableFromNowOn(model.parameters(), lr=0.01, foreach=True), "lookahead(k=2)")
    step = torch.compile(opt.step, backend="eager")
    train(model, opt, range(2), call=step)
    assert opt.param_groups[0]["capturable"] is False
    assert opt.updates == 2


@pytest.mark.parametrize("spec", ["sgd(lr=0.1, momentum=0.9)", "clip_grad_norm(0.01) | sgd(lr=0.1, momentum=0.9)"])
def test_momentum_that_begins_late_is_that_of_the_eager_step(spec: str) -> None:
    """torch's fused SGD takes all momentum buffers or none; compiled, it cannot be stepped in two parts."""
    runs = []
    for compiled in (True, False):
        model = small_model()
        opt = metaopt.build(model.named_parameters(), spec)
        step = torch.compile(opt.step, backend="eager") if compiled else opt.step
        last = list(model.parameters())[-1]
        for number in range(5):
            opt.zero_grad()
            loss_of(model, number).backward()
            if number < 2:
                last.grad = None
            step()
        runs.append(weights(model))
    torch.testing.assert_close(*runs, rtol=1e-6, atol=1e-7)
