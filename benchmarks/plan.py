"""A whole bench: what is measured, in which order, and what came of it."""

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import report
from benchmarks.contenders import Contender, chosen_baseline, make_contenders
from benchmarks.machine import machine, machine_line
from benchmarks.measure import SetResult, measure
from benchmarks.targets import ALL_SETS, TARGETS, Settings, Verdict, check_targets
from benchmarks.training_step import forward_and_backward
from metaopt.errors import ProblemError, did_you_mean
from metaopt.lab.device import usable_device
from metaopt.lab.shapes import DEFAULT_SETS, SETS, make_tensor_set
from metaopt.lab.timing import Spread


@dataclass(frozen=True)
class Plan:
    """What a bench measures and how."""

    contenders: list[Contender]
    notes: list[str]
    baseline: str
    sets: tuple[str, ...]
    rounds: int
    targets: tuple[str, ...]
    device: str
    dtype: torch.dtype


@dataclass
class Found:
    """What a bench measured."""

    plan: Plan
    machine: dict[str, str | int]
    sets: list[SetResult] = field(default_factory=list)
    training_pass: Spread | None = None
    verdicts: list[Verdict] = field(default_factory=list)

    def heading(self) -> str:
        """Return machine, dtype and date in one line."""
        return f"{machine_line(self.machine)}, {self._dtype()}, {datetime.date.today().isoformat()}"

    def tables(self) -> list[tuple[str, report.Table]]:
        """Return every table under its heading."""
        on_cpu = torch.device(self.plan.device).type == "cpu"
        shown = []
        for result in self.sets:
            pass_ = self.training_pass if result.name == "transformer" else None
            shown.append((report.set_heading(result), report.set_table(result, on_cpu, pass_)))
        if self.verdicts:
            shown.append(("targets, ratios of medians", report.target_table(self.verdicts)))
        return shown

    def remarks(self) -> list[str]:
        """Return what a reader of the tables must know."""
        return report.remarks(self.sets, self.plan.notes, self.training_pass, self.plan.rounds)

    def document(self) -> dict[str, Any]:
        """Return all of it for a file."""
        return report.document(
            self.machine, self._dtype(), self.sets, self.remarks(), self.training_pass, self.verdicts
        )

    def _dtype(self) -> str:
        return str(self.plan.dtype).removeprefix("torch.")


def plan_bench(
    *,
    specs: Sequence[str],
    shapes: Sequence[str] = (),
    rounds: int = 20,
    baseline: str | None = None,
    targets: bool = False,
    only: Sequence[str] = (),
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
) -> Plan:
    """Check everything that a user said before anything is measured. Raises MetaoptError."""
    if only and not targets:
        raise ProblemError("--only names targets: give --targets too")
    for given, known, what in ((shapes, SETS, "--shapes"), (only, TARGETS, "--only")):
        for name in given:
            if name not in known:
                raise ProblemError(f"{what} {name}: unknown.{did_you_mean(name, known)} There is: {', '.join(known)}")
    usable_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    contenders, notes = ([], []) if targets else make_contenders(specs, device, kind)
    return Plan(
        contenders=contenders,
        notes=notes,
        baseline="" if targets else chosen_baseline(contenders, baseline),
        sets=tuple(shapes) or (ALL_SETS if targets else DEFAULT_SETS),
        rounds=rounds,
        targets=(tuple(only) or TARGETS) if targets else (),
        device=device,
        dtype=kind,
    )


def run_bench(plan: Plan, say: Callable[[str], None] | None = None) -> Found:
    """Measure what the plan says. Raises MetaoptError where the memory does not suffice or a stack cannot be built."""
    found = Found(plan, machine(plan.device))
    if plan.targets:
        settings = Settings(plan.device, plan.dtype, plan.rounds, plan.sets, plan.targets, say or (lambda what: None))
        found.verdicts = list(check_targets(settings))
        return found
    for name in plan.sets:
        tensors = make_tensor_set(name, plan.device, plan.dtype)
        found.sets.append(measure(tensors, plan.contenders, plan.baseline, plan.rounds, say))
    if "transformer" in plan.sets:
        if say is not None:
            say("transformer: forward and backward")
        found.training_pass = forward_and_backward(plan.device, plan.dtype)
    return found
