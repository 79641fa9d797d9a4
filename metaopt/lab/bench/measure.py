"""One shape set measured: every contender's time, memory and bytes, side by side."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from metaopt.errors import ProblemError
from metaopt.lab.bench.bandwidth import BYTES, Probe
from metaopt.lab.bench.contenders import ByStack, Contender
from metaopt.lab.bench.memory import held_bytes, watch_cycle
from metaopt.lab.bench.rounds import Runner, Spread, interleave, ratios, spread
from metaopt.lab.bench.shapes import TensorSet
from metaopt.lab.bench.traffic import Traffic

# how often small tensors are made anew, and below how many bytes of parameters tensors are small
HEATS = 4
SMALL = 1 << 24


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
    runners, bandwidths = race(
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


def race(
    tensors: TensorSet,
    contenders: Sequence[Contender],
    rounds: int,
    cycles: Mapping[str, int] | None = None,
    probe: Probe | None = None,
    progress: Callable[[], None] | None = None,
) -> tuple[dict[str, Runner], list[float]]:
    """Time the contenders side by side; return them by key, with their samples, and the bandwidths measured between.

    Small tensors are made anew several times on the way: where an allocator happens to put them changes the time of
    one and the same contender by more than the contenders differ.
    """
    heats = min(rounds, HEATS if tensors.bytes < SMALL else 1)
    runners: dict[str, Runner] = {}
    bandwidths: list[float] = []
    for heat in range(heats):
        made = {c.key: runner_of(tensors, c, (cycles or {}).get(c.key)) for c in contenders}
        for key, runner in made.items():
            runner.samples = runners[key].samples if heat else []
        runners = made
        rounds_now = rounds * (heat + 1) // heats - rounds * heat // heats
        bandwidths += interleave(tensors, list(made.values()), rounds_now, probe, progress, seed=heat)
    return runners, bandwidths


def runner_of(tensors: TensorSet, contender: Contender, cycle: int | None = None) -> Runner:
    """Return a contender at work on parameters of its own; of a stack the cycle is known, by hand it is its equal's."""
    parameters = tensors.parameters()
    update = contender.make(parameters)
    return Runner(contender.key, update, parameters, cycle or _cycle(tensors, contender))


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
    return _Inspected(cycle, held_bytes(update.held()), peak, launches)


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
        ratio=ratios(runner, base),
        ratio_of_medians=seconds.median / spread(base.seconds()).median,
        updates_per_sample=runner.per_sample,
        state_bytes=inspected.state_bytes,
        temporary_bytes=inspected.temporary_bytes,
        least_bytes=least,
        of_bandwidth=least / bandwidth / seconds.median,
        launches=inspected.launches,
        finite=all(bool(p.isfinite().all()) for _, p in runner.parameters),
    )
