"""What is asked of an accelerator, and what is not left to it; without one. See also `test_emulated_device`."""

import warnings
from typing import Any

import pytest
import torch
from small_runs import small_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import metaopt
from metaopt.engine.fused.probes import divides_gradients, has_fused_kernel, takes_factor, updates_as_a_loop
from metaopt.engine.param_state.placeholders import is_template_step
from metaopt.lab import trial
from metaopt.lab.device import random_state, set_random_state
from metaopt.registry import registry
from metaopt.testing.proving import cases
from metaopt.testing.watching import Descent, FunctionWatch, waits_raise

KINDS = [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad]


# ---- kernels and factors


class Deaf(torch.optim.AdamW):
    """An AdamW whose kernel does not hear of a factor."""

    def step(self, closure: Any = None) -> Any:
        self.__dict__.pop("grad_scale", None)
        return super().step(closure)


class LeavesGradients(torch.optim.SGD):
    """An SGD that divides for itself, and leaves the gradients as they were."""

    def step(self, closure: Any = None) -> None:
        scale = vars(self).get("grad_scale", 1.0)
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad / scale, alpha=group["lr"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_s_kernels_for_a_processor_pass_what_others_are_put_to(kind: Any, dtype: torch.dtype) -> None:
    assert updates_as_a_loop(kind, "cpu", dtype)
    if dtype == torch.float32:
        assert divides_gradients(kind, "cpu", dtype)


@pytest.mark.parametrize("kind", [Deaf, LeavesGradients, torch.optim.RMSprop, torch.optim.LBFGS])
def test_a_kernel_that_does_not_divide_the_gradients_gets_no_factor(kind: Any) -> None:
    assert not divides_gradients(kind, "cpu", torch.float32)


def test_a_device_that_is_on_torch_s_list_alone_is_given_no_fused_kernel() -> None:
    assert not updates_as_a_loop(torch.optim.AdamW, "mtia", torch.float32)
    assert has_fused_kernel(torch.optim.AdamW, [torch.zeros(3)])
    assert not has_fused_kernel(torch.optim.AdamW, [torch.zeros(3), torch.zeros(3, device="meta")])


def test_a_factor_is_folded_on_devices_of_one_type_that_take_it() -> None:
    here, elsewhere = torch.zeros(3), torch.zeros(3, device="meta")
    assert takes_factor(torch.optim.AdamW, [here, here])
    assert not takes_factor(torch.optim.AdamW, [here, elsewhere])
    assert not takes_factor(torch.optim.AdamW, [elsewhere])


@pytest.mark.parametrize(
    ("given", "fused"), [("capturable=True", True), ("foreach=True", None), ("fused=False", False)]
)
def test_only_fused_and_foreach_choose_a_kernel(given: str, fused: bool | None) -> None:
    assert metaopt.build(small_model().named_parameters(), f"adamw({given})").param_groups[0]["fused"] is fused


# ---- captures


CASES = [case for kind in ("optimizer", "wrapper") for e in registry.entries(kind) for case in cases(e.name)]
SPECS = [case.subjects[0] for case in CASES if not case.example.skip_reason and "pytorch_optimizer" not in case.name]


@pytest.mark.parametrize("subject", SPECS, ids=str)
def test_a_step_that_is_captured_into_a_cuda_graph_is_refused(subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    _, opt = subject.pair()
    with FakeTensorMode():
        for group in opt.param_groups:
            group["params"] = [torch.nn.Parameter(torch.zeros(p.shape, device="cuda")) for p in group["params"]]
    with pytest.raises(metaopt.StepError, match="the count of updates") as caught:
        opt.step(lambda: None)
    for wrapper in opt.wrappers:
        if wrapper.acts_every is not None:
            assert f"when {wrapper.label} acts (every" in str(caught.value)


def test_the_refusal_names_what_python_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    spec = "skip_nonfinite(3) | accumulate(2) | adamw(lr=cosine(0.1)) | lookahead(k=5)"
    opt = metaopt.build(small_model().named_parameters(), spec, total_steps=9)
    with FakeTensorMode():
        opt.param_groups[0]["params"] = [torch.nn.Parameter(torch.zeros(3, device="cuda"))]
    with pytest.raises(metaopt.StepError) as caught:
        opt.step()
    for decision in ("the scheduled lr", "lookahead acts (every 5", "what skip_nonfinite does", "what accumulate does"):
        assert decision in str(caught.value)


def test_on_a_processor_nobody_asks_for_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    model = small_model()
    opt = metaopt.build(model.named_parameters(), "clip_grad_norm(1.0) | adamw | lookahead(k=2)")
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
    assert opt.updates == 3
    assert opt._run.accelerators == ()


# ---- waits


class Reads(TorchFunctionMode):
    """Counts the gradients that are asked whether they are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += getattr(function, "__name__", "") == "any"
        return function(*args, **(kwargs or {}))


def test_a_base_without_state_at_a_rate_of_0_is_asked_once_whether_a_client_looks_for_keys() -> None:
    model = small_model()
    opt = metaopt.wrap(torch.optim.SGD(model.parameters(), lr=0.1), "clip_grad_norm(1.0)")
    asked = []
    for rate in (0.1, 0.0, 0.0, 0.0, 0.1, 0.0, 0.0):
        opt.param_groups[0]["lr"] = rate
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with Reads() as reads:
            opt.step()
        asked.append(reads.number)
    assert asked == [0, 1, 0, 0, 0, 1, 0]
    assert opt.updates == 7


def test_a_rate_on_a_device_is_not_read_to_find_a_client_that_looks_for_keys() -> None:
    model = small_model()
    opt = metaopt.wrap(torch.optim.SGD(model.parameters(), lr=0.1), "clip_grad_norm(1.0)")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.param_groups[0]["lr"] = torch.zeros((), device="meta")  # to read it would raise
    assert not is_template_step(opt._run)
    opt.param_groups[0]["lr"] = torch.zeros(())
    assert is_template_step(opt._run)


def test_waits_raise_only_inside_though_torch_warns_of_the_mode_once(monkeypatch: pytest.MonkeyPatch) -> None:
    modes, warned = [0], []

    def set_mode(mode: Any) -> None:  # as in torch: the mode is set, then it warns
        modes.append(mode)
        if not warned:
            warned.append(True)
            warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    with pytest.raises(ZeroDivisionError), waits_raise():
        assert modes[-1] == "error"
        1 / 0  # noqa: B018
    assert modes == [0, "error", 0]


def test_a_copy_to_main_memory_counts_as_a_read_if_it_waits() -> None:
    weights = torch.ones(3)
    descent = Descent([weights], "")
    with FunctionWatch(descent):
        weights.to("cpu", non_blocking=True)
        weights.to(weights.device)
        weights.to(torch.float64)
        torch.zeros(3).to("cpu")
        assert descent.reads == []
        weights.to("cpu")
        weights.to(device="cpu", dtype=torch.float64)
    assert len(descent.reads) == 2


# ---- the lab


def test_a_trial_waits_for_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    trial._settle("cuda:1")
    trial._settle("cpu")
    assert waited == [torch.device("cuda", 1)]


def test_the_generator_of_a_device_is_kept_and_that_of_another_one_is_not_touched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: pytest.fail("CUDA was started"))
    assert random_state("cpu") is None
    assert random_state("meta") is None
    states = {"xpu": torch.zeros(1), "mps": torch.ones(1)}
    monkeypatch.setattr(torch.xpu, "get_rng_state", lambda device: (device, states["xpu"]))
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: states["mps"])
    monkeypatch.setattr(torch.xpu, "set_rng_state", lambda state, device: states.update(xpu=(device, state)))
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: states.update(mps=state))
    assert random_state("xpu:1") == (torch.device("xpu", 1), states["xpu"])
    assert random_state("mps") is states["mps"]
    set_random_state("xpu:1", torch.ones(2))
    set_random_state("mps", torch.ones(3))
    set_random_state("cpu", None)
    assert states["xpu"][0] == torch.device("xpu", 1)
    assert len(states["mps"]) == 3
