"""What `metaopt.explain` says of sizes that cannot be meant: rates, updates of 16-bit weights, averages."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from metaopt.distributed.shards import local
from metaopt.engine.chain import Chain, ParamGroup
from metaopt.explaining.practice import chains_of, number
from metaopt.explaining.probing import Characters
from metaopt.explaining.table import Finding
from metaopt.stack import Stack
from metaopt.wrapper import Wrapper

# a rate for bases whose updates are as large as the gradient makes them
HIGHEST_OF_SGD = 10.0
# elements of a tensor that are looked at
LOOKED_AT = 1 << 16
# how much of an average may still be the first weights at the end of the run
MOST_OF_FIRST = 0.05


def in_sizes(
    optimizer: torch.optim.Optimizer, peaks: Sequence[float | None], characters: Characters
) -> Iterator[Finding]:
    """Find rates and averages of a size that cannot be meant; `peaks` are the groups' highest rates, if known."""
    groups = optimizer.param_groups
    highest = {id(entry): peak for entry, peak in zip(groups, peaks, strict=True)} if peaks else {}
    found: dict[str, Finding] = {}
    for chain in chains_of(optimizer):
        for entry in chain.groups_in(groups):
            rate = max(number(entry.get("lr")), highest.get(id(entry)) or 0.0)
            for finding in _of_rate(chain, entry, rate, characters):
                found.setdefault(f"{finding.code} {type(chain.base)}", finding)
    yield from found.values()
    if isinstance(optimizer, Stack):
        yield from _averages(optimizer)


def _of_rate(chain: Chain, entry: ParamGroup, rate: float, characters: Characters) -> Iterator[Finding]:
    base = type(chain.base).__name__
    changed = any(wrapper.implemented_hooks() & {"on_update", "after_updates"} for wrapper in chain.ordered)
    if not rate or changed:
        return  # a part behind the base may give the update another size
    character = characters.of(chain, entry)
    if character is None:
        return
    if not character.ignores_scale:
        if rate >= HIGHEST_OF_SGD:
            yield Finding(
                "rate-too-high",
                f"lr={rate:g} is far above what {base} is used with, and training will most likely diverge",
                f"a rate between 0.001 and 1 with {base}",
            )
        return
    update, sample = rate * character.step_size, _sample(entry["params"])
    size = float(sample.float().square().mean().sqrt()) if sample.numel() else 0.0
    if size and update >= size:
        yield Finding(
            "rate-too-high",
            f"at lr={rate:g} one update of {base} moves a weight by up to {update:.2g}, and the weights are about "
            f"{size:.2g} in size",
            f"a lower rate, for instance {10 ** _exponent(0.01 * size / character.step_size):g}",
        )
    yield from _rounded(base, entry["params"], rate, update)


def _rounded(base: str, params: list[torch.Tensor], rate: float, update: float) -> Iterator[Finding]:
    """Find 16-bit weights of which most are so large that adding an update gives the same number again."""
    coarse = [p for p in params if p.dtype in (torch.bfloat16, torch.float16)]
    sample = _sample(coarse)
    if not sample.numel():
        return
    # half the distance to the next number is at least a quarter of eps times the number
    lost = float((sample.float().abs() * torch.finfo(sample.dtype).eps / 4 > update).float().mean())
    if lost > 0.5:
        yield Finding(
            "update-rounded-away",
            f"{lost:.0%} of the {str(sample.dtype).removeprefix('torch.')} weights do not change at lr={rate:g}: an "
            f"update of {base}, at most {update:.2g}, is below half the distance to the next number that 16 bits hold",
            "keep the weights in float32 and run the forward pass under torch.autocast",
        )


def _sample(params: list[torch.Tensor]) -> torch.Tensor:
    """Return some elements of the local parts of matrices that are not zero, or of all such tensors, of one dtype."""
    tensors = [local(p.detach()) for p in params if p.device.type != "meta" and p.is_floating_point()]
    tensors = [t for t in tensors if t.dim() > 1] or tensors
    tensors = [t for t in tensors if t.dtype == tensors[0].dtype and t.device == tensors[0].device]
    if not tensors:
        return torch.zeros(0)
    elements = torch.cat([t.flatten()[: max(1, LOOKED_AT // len(tensors))] for t in tensors])
    return elements[elements != 0]


def _exponent(value: float) -> int:
    """Return the exponent of the largest power of ten that is not above a number."""
    return int(f"{value:e}".partition("e")[2])


def _averages(stack: Stack) -> Iterator[Finding]:
    """Find averages that begin after the end of the run, or that are still mostly the first weights then."""
    run = stack.total_steps
    for chain in stack.chains if run is not None else ():
        entry = next(iter(chain.groups_in(stack.param_groups)), None)
        for wrapper in chain.ordered:
            if entry is not None and run is not None and "averaged" in wrapper.implemented_hooks():
                yield from _average(wrapper, entry, run, stack)


def _average(wrapper: Wrapper, entry: ParamGroup, run: int, stack: Stack) -> Iterator[Finding]:
    def value(name: str, default: Any) -> Any:
        return entry.get(f"{wrapper.label}.{name}", default)

    begins = int(value("start", 0))
    if begins >= run:
        yield Finding(
            "average-never-begins",
            f"{wrapper.label} begins after update {begins}, but the run has only {run} updates",
            f"{wrapper.label}(start={run // 2}) or less",
        )
        return
    key, decay = f"{wrapper.label}.decay", number(value("decay", 0.0))
    if not decay or value("warmup", False) or key in stack.schedules_of(entry):
        return
    times = max(1, (run - begins) // int(value("every", 1)))
    left = decay**times
    if left > MOST_OF_FIRST:
        yield Finding(
            "average-longer-than-run",
            f"at the end of {run} updates, {left:.0%} of the average of {wrapper.label} (decay={decay:g}) is still the "
            f"weights with which it began",
            f"{wrapper.label}({1 - 10 / max(times, 20):.4g}), or warmup=True",
        )
