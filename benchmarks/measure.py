"""One shape set measured: every contender's time, memory and bytes, side by side."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.bandwidth import BYTES, Probe
from benchmarks.clock import Sample
from benchmarks.contenders import ByStack, Contender
from benchmarks.memory import storage_bytes, watch_cycle
from benchmarks.rounds import Runner
from benchmarks.traffic import Traffic
from metaopt.errors import ProblemError
from metaopt.lab.shapes import TensorSet
from metaopt.lab.timing import Spread, count_rebuilds, ratios, spread, time_interleaved


@dataclass(frozen=True)
class Row:
    """What was measured of one contender over one shape set; times are seconds per update, sizes bytes."""

    key: str
    what: str
    equal: str
    seconds: Spread
    host_seconds: Spread
    ratio: Spread
    ratio_of_medians: float
    updates_per_sample: int
    state_bytes: int
    temporary_bytes: int
    least_bytes: float
    of_bandwidth: float
    launches: float
    finite: bool


@dataclass(frozen=True)
class SetResult:
    """All rows of one shape set, with what holds for all of them."""

    name: str
    tensors: int
    elements: int
    parameter_bytes: int
    rounds: int
    baseline: str
    bandwidth: Spread
    rows: list[Row]


@dataclass(frozen=True)
class _Inspected:
    cycle: int
    state_bytes: int
    temporary_bytes: int
    launches: float


def measure(
    tensors: TensorSet,
    contenders: Sequence[Contender],
    baseline: str,
    rounds: int,
    progress: Callable[[str], None] | None = None,
) -> SetResult:
    """Measure the contenders over one set of tensors. Raises ProblemError where the memory does not suffice."""
    check_memory(tensors, len(contenders))
    say = progress or (lambda what: None)
    inspected, traffic = {}, {}
    for contender in contenders:
        say(f"{tensors.name}: memory of {contender.key}")
        inspected[contender.key] = _inspect(tensors, contender)
        if contender.equal not in traffic:
            traffic[contender.equal] = sum(least_bytes(tensors, contender.equal).values())
    done = iter(range(1, rounds + 1))
    runners, bandwidths = time_contenders(
        tensors,
        contenders,
        rounds,
        {key: found.cycle for key, found in inspected.items()},
        Probe(tensors.weights[0].device),
        lambda: say(f"{tensors.name}: round {next(done)} of {rounds}"),
    )
    base = runners[baseline]
    bandwidth = spread(bandwidths)
    rows = [
        _row(contender, runner, base, inspected[contender.key], traffic[contender.equal], bandwidth.median)
        for contender, runner in zip(contenders, runners.values(), strict=True)
    ]
    return SetResult(
        tensors.name, len(tensors.names), tensors.elements, tensors.bytes, rounds, baseline, bandwidth, rows
    )


def time_contenders(
    tensors: TensorSet,
    contenders: Sequence[Contender],
    rounds: int,
    cycles: Mapping[str, int] | None = None,
    probe: Probe | None = None,
    progress: Callable[[], None] | None = None,
) -> tuple[dict[str, Runner], list[float]]:
    """Time the contenders side by side; return them by key, with their samples, and the bandwidths measured between."""
    runners: dict[str, Runner] = {}
    bandwidths: list[float] = []

    def make(contender: Contender) -> Callable[[], Sample]:
        runner = runners[contender.key] = make_runner(tensors, contender, (cycles or {}).get(contender.key))
        runner.warm_up()
        return runner.measure

    def before_round() -> None:
        if probe is not None:
            bandwidths.append(probe.measure())
        if progress is not None:
            progress()

    makers = {contender.key: partial(make, contender) for contender in contenders}
    for key, samples in time_interleaved(makers, rounds, count_rebuilds(tensors), before_round).items():
        runners[key].samples = samples
    return runners, bandwidths


def make_runner(tensors: TensorSet, contender: Contender, cycle: int | None = None) -> Runner:
    """Return a runner with its own parameters; baselines use the cycle length of the equal stack."""
    parameters = tensors.parameters()
    update = contender.make(parameters)
    return Runner(contender.key, update, tensors, parameters, cycle or _cycle(tensors, contender))


def least_bytes(tensors: TensorSet, spec: str) -> dict[str, float]:
    """Return the bytes that one update of a stack must move at least, by part, the mean over a whole cycle."""
    parameters = tensors.parameters()
    made = ByStack(spec, parameters)
    tensors.restore(parameters)
    made.step()
    cycle = made.cycle()
    # on the way to the next full cycle, so that all that is due is due once
    for _ in range(cycle - 1):
        tensors.restore(parameters)
        made.step()
    return Traffic(made.stack).watch(made.step, lambda: tensors.restore(parameters), cycle)


def check_memory(tensors: TensorSet, contenders: int) -> None:
    """Raise ProblemError where so many contenders, with two moments and slow weights each, would not fit."""
    needed = tensors.bytes * (3 + 4 * contenders) + 2 * BYTES
    free = _free_bytes(tensors.weights[0].device)
    if free is not None and needed > free:
        raise ProblemError(
            f"{tensors.name} needs about {needed / 1e9:.1f} GB for {contenders} contenders side by side, "
            f"{free / 1e9:.1f} GB are free: choose smaller sets with --shapes, or fewer specs"
        )


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # another system than Linux tells it in other ways
        return None


def _cycle(tensors: TensorSet, contender: Contender) -> int:
    # built and never stepped: it may look at the very weights that everyone begins at
    looked_at = [(n, torch.nn.Parameter(w)) for n, w in zip(tensors.names, tensors.weights, strict=True)]
    return ByStack(contender.equal, looked_at).cycle()


def _inspect(tensors: TensorSet, contender: Contender) -> _Inspected:
    cycle = _cycle(tensors, contender)
    parameters = tensors.parameters()
    update = contender.make(parameters)

    def restore() -> None:
        tensors.restore(parameters)

    for _ in range(cycle):
        restore()
        update.step()
    peak, launches = watch_cycle(update.step, restore, cycle, tensors.weights[0].device)
    return _Inspected(cycle, storage_bytes(update.kept_tensors()), peak, launches)


def _row(
    contender: Contender, runner: Runner, base: Runner, inspected: _Inspected, least: float, bandwidth: float
) -> Row:
    seconds = spread(runner.seconds())
    return Row(
        key=contender.key,
        what=contender.what,
        equal=contender.equal,
        seconds=seconds,
        host_seconds=spread([s.host for s in runner.samples]),
        ratio=ratios(runner.seconds(), base.seconds()),
        ratio_of_medians=seconds.median / spread(base.seconds()).median,
        updates_per_sample=runner.updates_per_sample,
        state_bytes=inspected.state_bytes,
        temporary_bytes=inspected.temporary_bytes,
        least_bytes=least,
        of_bandwidth=least / bandwidth / seconds.median,
        launches=inspected.launches,
        finite=all(bool(p.isfinite().all()) for _, p in runner.parameters),
    )
