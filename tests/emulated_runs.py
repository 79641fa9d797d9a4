"""Runs on the emulated device, each called in a new process; they return what the tests hold."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import emulation
import torch
from small_runs import fill_gradients, small_model

import metaopt
from metaopt.engine.fused.probes import takes_factor
from metaopt.errors import StepError
from metaopt.registry import registry
from metaopt.testing.feeding import make_batch
from metaopt.testing.proving import cases
from metaopt.testing.subject import StackSubject

STEPS = 6


def run(library: Path, function: str, *arguments: Any) -> Any:
    """Load the device and call a function of this module."""
    emulation.load(library)
    torch.set_num_threads(1)
    return globals()[function](*arguments)


def trained(spec: str, device: str, last: str | None = None) -> tuple[Any, list[torch.Tensor]]:
    """Return a stack and the weights after a run whose gradients grow; `last` is the device of the last layer."""
    model = small_model().to(device)
    model[-1].to(last or device)
    opt = metaopt.build(model.named_parameters(), spec, total_steps=STEPS)
    source = small_model()
    for step in range(STEPS):
        with torch.no_grad():
            for p, q in zip(source.parameters(), model.parameters(), strict=True):
                p.copy_(q)
        fill_gradients(source, step)
        for p, q in zip(model.parameters(), source.parameters(), strict=True):
            p.grad = (q.grad * (1 + step)).to(p.device)
        opt.step()
    return opt, [p.detach().cpu() for p in model.parameters()]


def apart(spec: str, last: str | None = None) -> float:
    """Return how far a run on the device ends from the same run on the processor."""
    _, here = trained(spec, "cpu")
    _, there = trained(spec, "emulated", last)
    return max(float((a - b).abs().max()) for a, b in zip(here, there, strict=True))


def factor(kind: str, spec: str, ignored: bool) -> tuple[bool, float]:
    """Return whether a kernel is said to take the factor, and how far the run is from that on the processor."""
    with emulation.mode("ignores the factor") if ignored else contextlib.nullcontext():
        p = torch.zeros(1, device="emulated")
        return takes_factor(getattr(torch.optim, kind), [p]), apart(spec)


def without_kernels(spec: str) -> tuple[Any, float]:
    """Return what a stack chose to run by on a device without fused kernels, and how far it ends from the processor."""
    with emulation.mode("lacks fused kernels"):
        opt, _ = trained(spec, "emulated")
        return opt.param_groups[0]["fused"], apart(spec)


def beside_the_processor(spec: str) -> tuple[bool, float]:
    """Return whether a factor is folded if one group is on both, and how far the run is from that on the processor."""
    mixed = [torch.zeros(1), torch.zeros(1, device="emulated")]
    return takes_factor(torch.optim.AdamW, mixed), apart(spec, "cpu")


def subjects() -> list[StackSubject]:
    """Return every registered optimizer and wrapper as its example says, on the device."""
    found = [
        case.subjects[0]
        for kind in ("optimizer", "wrapper")
        for entry in registry.entries(kind)
        if entry.origin == "metaopt"
        for case in cases(entry.name, device="emulated")
        if not case.example.skip_reason and case.example.gradients != "sparse"  # of which the device knows nothing
    ]
    return [subject for subject in found if isinstance(subject, StackSubject)]


def waits() -> dict[str, str]:
    """Return which parts let the host wait in an update, and for what."""
    found = {}
    for subject in subjects():
        try:
            model, opt = subject.pair()
            if any(wrapper.syncs_device for wrapper in opt.wrappers):
                continue
            step = opt.step
            opt.step = watched(step)  # type: ignore[method-assign]
            subject.train(model, opt, 0, STEPS)
        except Exception as error:
            found[str(subject)] = str(error.__cause__ or error)[:200]
    return found


def watched(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a step in which waits raise, but not in the closure."""

    def call(*closure: Any) -> Any:
        with emulation.mode("raises"):
            return step(*map(unwatched, closure))

    return call


def unwatched(closure: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        torch.ops.emulated.set_mode(emulation.MODES.index("raises"), False)
        try:
            return closure()
        finally:
            torch.ops.emulated.set_mode(emulation.MODES.index("raises"), True)

    return call


def captured() -> tuple[int, dict[str, str]]:
    """Return how many parts were tried inside a capture, and which were not refused, or could not go on behind it."""
    wrong, tried = {}, subjects()
    for subject in tried:
        model, opt = subject.pair()
        subject.train(model, opt, 0, 2)
        before = [p.detach().clone() for p in model.parameters()]
        updates = opt.updates
        subject.gradients(model, make_batch(model, 2))
        try:
            with emulation.mode("captures"):
                opt.step(lambda: None)
            wrong[str(subject)] = "was captured"
        except StepError as error:
            if "the count of updates" not in str(error):
                wrong[str(subject)] = str(error)
        if opt.updates != updates or not all(map(torch.equal, before, model.parameters())):
            wrong[str(subject)] = "the refused step changed something"
        subject.train(model, opt, 2, 3)
    return len(tried), wrong


def rates() -> list[str]:
    """Return which rates an SGD without state waits for."""
    found = []
    for name, rate in (("on the device", torch.tensor(0.1, device="emulated")), ("of 0", 0.0)):
        model = small_model().to("emulated")
        opt = metaopt.wrap(torch.optim.SGD(model.parameters(), lr=rate, fused=True), "clip_grad_norm(1.0)")
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        if name == "of 0":
            opt.step()  # asked once whether a client looks for keys
        try:
            with emulation.mode("raises"):
                opt.step()
                opt.step()
        except RuntimeError as error:
            found.append(f"{name}: {error}")
        if opt.updates != 2 + (name == "of 0"):
            found.append(f"{name}: {opt.updates} updates")
    return found
