"""`python -m benchmarks.profile_tiny [OLD]`: where one update of the full stack on `tiny` spends its time.

torch's calls are recorded in some updates and made again on the same tensors, without the code around them: that is
torch's share, and the rest is Python. A profiler would slow Python down and let it look larger than it is. OLD is the
checkout of an earlier version: each has a process of its own, and the two take turns. Without the library.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import metaopt

# only what every version has is used of metaopt, and nothing of this folder by the process of an old one
FULL = "clip_grad_norm(1.0) | adamw | lookahead(k=5)"
SHAPES = [(128, 64), (128,), (128, 128), (128,), (10, 128), (10,)]
ROUNDS, CYCLE, CYCLES, TURNS = 20, 5, 20, 3
# what torch is called for, by the names of its functions
PURPOSES = {
    "AdamW's kernel": {"_fused_adamw_"},
    "counting updates": {"_foreach_add_", "add_"},
    "the norm": {"_foreach_norm", "stack", "cat", "linalg_vector_norm"},
    "the factor of the clip": {"add", "reciprocal", "reciprocal_", "mul_", "clamp_", "clamp", "div", "to"},
    "the pull of every fifth update": {"_foreach_lerp_", "_foreach_copy_"},
}
CALLS, OPTIM, ENGINE = "all calls of torch", "Python of `torch.optim`", "Python of metaopt"
TOTAL, HAND = "an update", "by hand"

# what a call is for, whether `torch.optim` made it, and the call itself
Made = tuple[str, bool, Callable[[], Any]]
# label: microseconds of an update
Times = dict[str, float]


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators: a call that reaches none, such as a look at a dtype, is not torch's work."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


class Recorder(TorchFunctionMode):
    """Notes the calls of torch, with what they were given and whether `torch.optim` made them."""

    def __init__(self, optim: "Optim") -> None:
        super().__init__()
        self.calls: list[Made] = []
        self._optim = optim

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with Operators() as operators:  # type: ignore[no-untyped-call]
            out = func(*args, **(kwargs or {}))
        if operators.number:
            name = func.__name__
            purpose = next((purpose for purpose, names in PURPOSES.items() if name in names), f"`{name}`")
            given = [list(a) if isinstance(a, list) else a for a in args]
            self.calls.append((purpose, self._optim.depth > 0, lambda: func(*given, **(kwargs or {}))))
        return out


class Optim:
    """Times the two functions in which `torch.optim.AdamW.step` does its work, by wrapping them for a while."""

    def __init__(self) -> None:
        self.depth, self.seconds = 0, 0.0

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began
                self.depth -= 1

        return call

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Wrap them for the time of the context."""
        module: Any = sys.modules[torch.optim.Adam.__module__]
        kind: Any = torch.optim.Adam
        own = module.adam, kind._init_group
        module.adam, kind._init_group = map(self._timed, own)
        try:
            yield
        finally:
            module.adam, kind._init_group = own


class Contender:
    """Parameters of an update, and their gradients, which are put back before each."""

    def __init__(self, stack: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [torch.nn.Parameter(torch.randn(s, generator=generator) * 0.02) for s in SHAPES]
        self.gradients = [torch.randn(s, generator=generator) for s in SHAPES]
        self.held = [torch.empty_like(g) for g in self.gradients]
        for p, held in zip(self.params, self.held, strict=True):
            p.grad = held
        if stack:
            self.step: Callable[[], Any] = metaopt.build(self.params, FULL).step
        else:
            base = torch.optim.AdamW(self.params, fused=True)
            self.step = lambda: (torch.nn.utils.clip_grad_norm_(self.params, 1.0), base.step())

    def microseconds(self, step: Callable[[], Any], updates: int = CYCLE * CYCLES) -> float:
        """Return the mean time of a call, of which there is one for each update."""
        total = 0.0
        for _ in range(updates):
            torch._foreach_copy_(self.held, self.gradients)
            began = time.thread_time()
            step()
            total += time.thread_time() - began
        return total / updates * 1e6


def recorded(contender: Contender, optim: Optim) -> list[Made]:
    """Return the calls of a whole cycle of updates."""
    recorder = Recorder(optim)
    with optim.watched(), recorder:
        for _ in range(CYCLE):
            with torch._C.DisableTorchFunction():
                torch._foreach_copy_(contender.held, contender.gradients)
            contender.step()
    return recorder.calls


def replay(calls: list[Callable[[], Any]]) -> Callable[[], None]:
    """Return what makes all of these calls."""

    def all_of_them() -> None:
        for call in calls:
            call()

    return all_of_them


def measured() -> tuple[list[Times], dict[str, float]]:
    """Return the microseconds of an update by label, in each round, and how many calls of torch each label has."""
    torch.set_num_threads(1)
    stack, hand, optim = Contender(stack=True), Contender(stack=False), Optim()
    for contender in (stack, hand):
        contender.microseconds(contender.step)
    calls = recorded(stack, optim)
    groups: dict[tuple[str, bool], list[Callable[[], Any]]] = {}
    for purpose, inside, call in calls:
        groups.setdefault((purpose, inside), []).append(call)
    rounds: list[Times] = []
    for _ in range(ROUNDS):
        found = {TOTAL: stack.microseconds(stack.step), HAND: hand.microseconds(hand.step), CALLS: 0.0, OPTIM: 0.0}
        with torch.no_grad():
            for (purpose, inside), group in groups.items():
                spent = stack.microseconds(replay(group), CYCLES) / CYCLE
                found[purpose] = found.get(purpose, 0.0) + spent
                found[CALLS] += spent
                found[OPTIM] -= spent if inside else 0.0
        optim.seconds = 0.0
        with optim.watched():
            stack.microseconds(stack.step)
        found[OPTIM] += optim.seconds / (CYCLE * CYCLES) * 1e6
        found[ENGINE] = found[TOTAL] - found[CALLS] - found[OPTIM]
        rounds.append(found)
    often = {purpose: number / CYCLE for purpose, number in Counter(purpose for purpose, *_ in calls).items()}
    return rounds, {**often, CALLS: sum(often.values())}


def in_a_process(checkout: Path) -> tuple[list[Times], dict[str, float]]:
    """Return what a new process measures with the metaopt of a checkout."""
    # a pass of the library is not a call of torch
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "METAOPT_KERNELS": "0"}
    # -P: the folder of this program must not come before PYTHONPATH
    command = [sys.executable, "-P", __file__, "--worker"]
    done = subprocess.run(command, env=environment, cwd=checkout, stdout=subprocess.PIPE, text=True, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    if Path(answer["package"]).parent != checkout / "metaopt":
        raise SystemExit(f"{checkout} has no package metaopt: {answer['package']} was imported")
    return answer["rounds"], answer["often"]


def main(checkouts: list[Path]) -> None:
    """Print a table as Markdown, with a column for each checkout: microseconds, and the share of an update by hand."""
    columns: list[list[Times]] = [[] for _ in checkouts]
    often: list[dict[str, float]] = [{} for _ in checkouts]
    for _ in range(TURNS):
        for i, checkout in enumerate(checkouts):
            rounds, often[i] = in_a_process(checkout)
            columns[i] += rounds
    known = {label for column in columns for label in column[0]}
    rest = [CALLS, OPTIM, ENGINE, TOTAL, HAND]
    labels = [*PURPOSES, *sorted(known - {*PURPOSES, *rest}), *rest]
    print(f"| us of an update (to by hand) | {' | '.join(map(str, checkouts))} |\n|{' --- |' * (1 + len(checkouts))}")
    for label in labels:
        print(f"| {label} | {' | '.join(_cell(label, *each) for each in zip(columns, often, strict=True))} |")


def _cell(label: str, rounds: list[Times], often: dict[str, float]) -> str:
    if label not in rounds[0]:
        return ""
    spent = median(each[label] for each in rounds)
    share = median(each[label] / each[HAND] for each in rounds)
    return f"{spent:.1f} ({share:.2f})" + (f", {often[label]:g} calls" if label in often else "")


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        found, counts = measured()
        print(json.dumps({"rounds": found, "often": counts, "package": metaopt.__file__}))
    else:
        main([*(Path(old).resolve() for old in sys.argv[1:]), Path(__file__).resolve().parent.parent])
