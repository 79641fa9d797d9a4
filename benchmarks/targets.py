"""What the project promises about time, each promise measured: target, measured, at most, met or missed."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from benchmarks import start_up
from benchmarks.bandwidth import Probe
from benchmarks.contenders import ByStack, Contender, find_baselines, stack_contender
from benchmarks.measure import check_memory, least_bytes, time_contenders
from benchmarks.rounds import Runner
from metaopt.errors import MetaoptError
from metaopt.lab.shapes import TensorSet, make_tensor_set
from metaopt.lab.timing import steps_of_update
from metaopt.registry import registry
from metaopt.specs.pipeline import part

WHOLE = "clip_grad_norm(1.0) | adamw | lookahead(k=5)"
ALL_SETS = ("tiny", "transformer", "large", "many")
LOG_EVERY = 50
TARGETS = ("1", "2", "2b", "3", "4", "5", "6", "7", "8")


@dataclass(frozen=True)
class Verdict:
    """One target on one shape set: what was measured, the limit, and whether it holds (None: nothing to measure)."""

    target: str
    what: str
    where: str
    measured: float | None
    at_most: float
    unit: str
    met: bool | None
    remark: str = ""


@dataclass
class Settings:
    """How targets are checked; `only` names those that are."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    rounds: int = 20
    sets: Sequence[str] = ALL_SETS
    only: Sequence[str] = TARGETS
    progress: Callable[[str], None] = field(default=lambda what: None)

    def tensors(self, name: str) -> TensorSet:
        """Make a shape set as these settings want it."""
        return make_tensor_set(name, self.device, self.dtype)

    def wants(self, *targets: str) -> bool:
        """Tell whether any of these targets is to be checked."""
        return any(target in self.only for target in targets)


# target, what, against (a key), at most by shape set
_AGAINST_HAND = (
    ("1", "against clip_grad_norm_ + fused AdamW", "torch-fused", {"tiny": 0.80, "transformer": 0.90, "large": 1.00}),
    (
        "2",
        "against clip_grad_norm_ + default AdamW + Lookahead of pytorch-optimizer",
        "pytorch-optimizer",
        dict.fromkeys(("tiny", "transformer", "large"), 0.40),
    ),
    (
        "2b",
        "against the expert's hand-written equal with Lookahead",
        "expert-lookahead",
        dict.fromkeys(("tiny", "transformer", "large"), 1.05),
    ),
)
_AGAINST_FUSED = (
    (
        "3",
        "adamw | lookahead(k=5)",
        "against fused AdamW alone",
        {"tiny": 1.12, "transformer": 1.12, "large": 1.15, "many": 1.15},
    ),
    ("4", "adamw", "against fused AdamW alone", dict.fromkeys(ALL_SETS, 1.05)),
)


def check_targets(settings: Settings) -> Iterator[Verdict]:
    """Measure each target and say whether it is met. Raises MetaoptError where the memory does not suffice."""
    for name in settings.sets:
        tensors = settings.tensors(name)
        if settings.wants("1", "2", "2b") and name != "many":
            yield from _whole_stack(settings, tensors)
        if settings.wants("3", "4"):
            yield from _base_alone(settings, tensors)
        if settings.wants("5") and name == "large":
            yield from _each_wrapper(settings, tensors)
        if settings.wants("6") and name in ("transformer", "large"):
            yield _logging(settings, tensors)
    if settings.wants("7", "8"):
        yield from _starting(settings)


def _run(settings: Settings, tensors: TensorSet, contenders: Sequence[Contender]) -> dict[str, Runner]:
    check_memory(tensors, len(contenders))
    settings.progress(f"{tensors.name}: {', '.join(contender.key for contender in contenders)}")
    return time_contenders(tensors, contenders, settings.rounds)[0]


def _ratio(runners: dict[str, Runner], a: str, b: str) -> float:
    return median(runners[a].seconds()) / median(runners[b].seconds())


def _whole_stack(settings: Settings, tensors: TensorSet) -> Iterator[Verdict]:
    baselines, notes = find_baselines(WHOLE, settings.device, settings.dtype)
    rivals = [(t, key) for t, _, key, _ in _AGAINST_HAND if t in settings.only]
    present = [contender for contender in baselines if contender.key in {key for _, key in rivals}]
    runners = _run(settings, tensors, [stack_contender(WHOLE), *present])
    for target, against, key, limits in _AGAINST_HAND:
        if target not in settings.only:
            continue
        what = f"{WHOLE} {against}"
        if key not in runners:
            remark = next((note for note in notes if key in note), f"{key} cannot be measured here")
            yield Verdict(target, what, tensors.name, None, limits[tensors.name], "times", None, remark)
            continue
        yield _at_most(target, what, tensors.name, _ratio(runners, "stack", key), limits[tensors.name])


def _base_alone(settings: Settings, tensors: TensorSet) -> Iterator[Verdict]:
    baselines, _ = find_baselines("adamw", settings.device, settings.dtype)
    fused = [contender for contender in baselines if contender.key == "torch-fused"]
    stacks = [stack_contender(spec, spec) for t, spec, _, _ in _AGAINST_FUSED if t in settings.only]
    runners = _run(settings, tensors, [*fused, *stacks])
    for target, spec, against, limits in _AGAINST_FUSED:
        if target in settings.only and fused:
            measured = _ratio(runners, spec, "torch-fused")
            yield _at_most(target, f"{spec} {against}", tensors.name, measured, limits[tensors.name])


def _each_wrapper(settings: Settings, tensors: TensorSet) -> Iterator[Verdict]:
    """Time what a wrapper adds to `adamw`, against the bytes that it must move at the bandwidth just measured."""
    limit = 1.3
    for name, text, reason in wrappers_alone():
        if text is None:
            yield Verdict("5", name, tensors.name, None, limit, "times its bytes", None, reason)
            continue
        try:
            bytes_by_part = least_bytes(tensors, text)
        except MetaoptError as error:
            yield Verdict("5", name, tensors.name, None, limit, "times its bytes", None, str(error))
            continue
        contenders = [stack_contender("adamw", "adamw"), stack_contender(text, text)]
        check_memory(tensors, len(contenders))
        settings.progress(f"{tensors.name}: what {name} adds")
        runners, bandwidths = time_contenders(tensors, contenders, settings.rounds, probe=Probe(settings.device))
        update = runners[text].update
        steps = steps_of_update(update.stack) if isinstance(update, ByStack) else 1
        seconds = zip(runners[text].seconds(), runners["adamw"].seconds(), strict=True)
        added = median(steps * a - b for a, b in seconds)
        must = steps * sum(moved for label, moved in bytes_by_part.items() if label) / median(bandwidths)
        if must == 0.0:
            yield Verdict("5", text, tensors.name, None, limit, "times its bytes", None, "it moves no bytes of its own")
            continue
        yield _at_most("5", text, tensors.name, added / must, limit, "times its bytes")


def wrappers_alone() -> Iterator[tuple[str, str | None, str]]:
    """Return every registered wrapper with the stack that has it alone around `adamw`, or None and the reason."""
    for entry in registry.entries("wrapper"):
        chosen = part(entry.name, "wrapper")
        acts = entry.target.implemented_hooks()
        required = [h for h in chosen.hyperparameters.values() if h.required]
        if not acts - {"averaged"} or "around" in acts:
            yield entry.name, None, "it owns the evaluation of the loss: its update alone says nothing"
            continue
        # a threshold or a rate that a wrapper insists on; its size does not change what is computed
        given: dict[str, Any] = {h.name: 1 if h.type is int else 0.1 for h in required}
        if entry.target.spans_steps is not None:  # a window of one gradient has nothing to do
            given[entry.target.spans_steps] = 2
        try:
            text = str(chosen(**given))
        except MetaoptError as error:
            yield entry.name, None, str(error)
            continue
        yield entry.name, f"{text} | adamw" if entry.target.runs_before_base() else f"adamw | {text}", ""


def _logging(settings: Settings, tensors: TensorSet) -> Verdict:
    """Time whole windows of 50 updates, with a log and without."""
    with tempfile.TemporaryDirectory() as folder:
        logged = stack_contender(WHOLE, "logged", log=folder, log_every=LOG_EVERY)
        contenders = [stack_contender(WHOLE, "unlogged"), logged]
        check_memory(tensors, len(contenders))
        settings.progress(f"{tensors.name}: with and without a log")
        # a sample is fifty updates long: fewer rounds say as much
        windows = dict.fromkeys(("unlogged", "logged"), LOG_EVERY)
        runners, _ = time_contenders(tensors, contenders, max(3, settings.rounds // 4), windows)
        measured = _ratio(runners, "logged", "unlogged")
        for runner in runners.values():
            runner.update.close()
    return _at_most("6", f"{WHOLE} with log_every={LOG_EVERY} against the same without", tensors.name, measured, 1.02)


def _starting(settings: Settings) -> Iterator[Verdict]:
    settings.progress("starting processes")
    if settings.wants("7"):
        more = median(start_up.seconds_after("torch", start_up.FIRST_USE, max(3, settings.rounds // 2)))
        what = f"{start_up.FIRST_USE}, after import torch"
        yield _at_most("7", what, "a new process", more * 1000.0, 60.0, "ms more")
    if settings.wants("8"):
        for arguments in (["--help"], ["list", "--help"]):
            seconds = median(start_up.process_seconds(["-m", "metaopt", *arguments], max(3, settings.rounds // 2)))
            torch_free = not start_up.help_imports_torch(arguments)
            verdict = _at_most("8", f"metaopt {' '.join(arguments)}", "a new process", seconds, 0.4, "s")
            remark = "imports no torch" if torch_free else "imports torch"
            yield Verdict(**{**vars(verdict), "met": bool(verdict.met) and torch_free, "remark": remark})


def _at_most(target: str, what: str, where: str, measured: float, limit: float, unit: str = "times") -> Verdict:
    return Verdict(target, what, where, measured, limit, unit, measured <= limit)
