"""What `metaopt.explain` looks for: each check yields findings with a code, a reason and a fix."""

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from metaopt.engine.param_state.scratch import bases_undoing_moves
from metaopt.engine.run.entries import AVERAGE_SHOWN
from metaopt.explaining.orthogonal import on_layers
from metaopt.explaining.practice import in_practice, number
from metaopt.explaining.probing import Characters
from metaopt.explaining.sizes import in_sizes
from metaopt.explaining.table import Finding, some
from metaopt.hyperparameters import from_signature
from metaopt.lr_reporter import ReadOnlyLRScheduler
from metaopt.misuse.base import FIGHT_FIX, fight
from metaopt.schedule import Schedule, TupleSchedule
from metaopt.stack import Stack

Entry = dict[str, Any]
Optimizer = torch.optim.Optimizer


def in_optimizer(
    optimizer: Optimizer,
    model: torch.nn.Module | None,
    drivers: tuple[list[str], list[str]],
    batch_size: int | None = None,
    peaks: Sequence[float | None] = (),
) -> tuple[Finding, ...]:
    """Return everything suspicious about an optimizer, and about it beside a model or a batch size if one is given.

    `drivers` are what `marked_schedulers` or `found_schedulers` returned, `peaks` is the highest learning rate that
    each group will have, as far as it is known.
    """
    names = _names(optimizer, model)
    found = [*_in_groups(optimizer.param_groups, names), *_rates(optimizer, *drivers)]
    if model is not None:
        found += _beside_model(optimizer, model)
    if isinstance(optimizer, Stack):
        found += [*_cycles(optimizer), *_lengths(optimizer)]
        for chain, movers in bases_undoing_moves(optimizer.chains, optimizer.param_groups):
            found.append(Finding("base-bound-to-weights", fight(chain.base, movers), FIGHT_FIX.lower()))
        found += in_entries(optimizer.param_groups)
    characters = Characters()
    found += in_practice(optimizer, batch_size, peaks, characters)
    found += in_sizes(optimizer, peaks, characters)
    found += on_layers(optimizer, model, names, characters)
    return tuple(found)


def in_entries(entries: Sequence[Entry]) -> Iterator[Finding]:
    """Find what the group entries alone tell; those of a checkpoint will do."""
    swapped = next((entry[AVERAGE_SHOWN] for entry in entries if entry.get(AVERAGE_SHOWN)), None)
    if swapped:
        yield Finding(
            "inside-averaged",
            f"the parameters hold the average of {swapped}, not the weights that are trained",
            "save and continue outside `with opt.averaged():`; a stack that loads this restores the weights at its "
            "first step()",
        )


def _names(optimizer: Optimizer, model: torch.nn.Module | None) -> dict[int, str]:
    """Return a name for every parameter, by identity: the model's, the group's or its place."""
    names: dict[int, str] = {}
    for position, entry in enumerate(optimizer.param_groups):
        given = entry.get("param_names") or []
        for place, parameter in enumerate(entry["params"]):
            names[id(parameter)] = given[place] if place < len(given) else f"group {position}, parameter {place}"
    if model is not None:
        names.update({id(parameter): name for name, parameter in model.named_parameters()})
    return names


def _in_groups(entries: Sequence[Entry], names: dict[int, str]) -> Iterator[Finding]:
    members = [parameter for entry in entries for parameter in entry["params"]]
    twice = [names[identity] for identity, times in Counter(map(id, members)).items() if times > 1]
    if twice:
        yield Finding(
            "parameter-in-two-groups",
            f"each step updates these parameters more than once, because several groups hold them: {some(twice)}",
            "put every parameter into one group only, as metaopt.groups(model, ...) does",
        )
    yield from _flat_decays(entries, names)
    frozen = [names[id(p)] for p in members if not p.requires_grad]
    if frozen:
        yield Finding(
            "frozen-parameter",
            f"these parameters do not require gradients, so they are never updated: {some(frozen)}",
            "leave them out: [p for p in model.parameters() if p.requires_grad]",
        )


def _flat_decays(entries: Sequence[Entry], names: dict[int, str]) -> Iterator[Finding]:
    keys = dict.fromkeys(key for entry in entries for key in entry if key.rpartition(".")[2] == "weight_decay")
    for key in keys:
        flat = [names[id(p)] for entry in entries if number(entry.get(key)) for p in entry["params"] if p.dim() <= 1]
        if flat:
            yield Finding(
                "decay-on-1d",
                f"weight decay also acts on biases and norm layers: {some(flat)}",
                'build over metaopt.groups(model, no_decay="1d")',
            )


def _beside_model(optimizer: Optimizer, model: torch.nn.Module) -> Iterator[Finding]:
    held = {id(p) for entry in optimizer.param_groups for p in entry["params"]}
    named = dict(model.named_parameters())
    missing = [name for name, p in named.items() if p.requires_grad and id(p) not in held]
    if missing:
        yield Finding(
            "parameter-in-no-group",
            f"these parameters of the model are in no group, so they are never updated: {some(missing)}",
            "make the optimizer after the model is complete, or call opt.add_param_group(...)",
        )
    foreign = len(held - {id(p) for p in named.values()})
    if foreign:
        yield Finding(
            "parameter-not-in-model",
            f"{foreign} of the optimizer's {len(held)} parameters do not belong to the model, which does not use them",
            "make the optimizer after the last change to the model (a new layer, a copy, a cast that makes new ones)",
        )


def marked_schedulers(optimizer: Optimizer) -> tuple[list[str], list[str]]:
    """Return what torch's mark on `step` tells, in the form of `found_schedulers`; looks at nothing else."""
    bases = [optimizer, optimizer.base] if isinstance(optimizer, Stack) else [optimizer]
    marked = any(hasattr(base.step, "_wrapped_by_lr_sched") for base in bases)
    return (["torch scheduler"] if marked else []), []


def found_schedulers(optimizer: Optimizer) -> tuple[list[str], list[str]]:
    """Return the classes of live torch schedulers bound to this optimizer, and to another over its parameters.

    Looks at every object that the garbage collector tracks: seconds in a large process.
    """
    bound: list[LRScheduler] = []
    elsewhere: list[LRScheduler] = []
    own = {id(optimizer)} | ({id(optimizer.base)} if isinstance(optimizer, Stack) else set())
    held = {id(p) for entry in optimizer.param_groups for p in entry["params"]}
    kinds = set(_kinds_of(LRScheduler)) - {ReadOnlyLRScheduler}
    # an optimizer does not know its schedulers; only a search finds the one that drives a forgotten optimizer
    for candidate in [found for found in gc.get_objects() if type(found) in kinds]:
        driven = vars(candidate).get("optimizer")
        driven = getattr(driven, "optimizer", driven)  # Accelerate puts a shell around the optimizer
        if driven is None or id(driven) in own:
            bound += [candidate] if driven is not None else []
        elif any(id(p) in held for entry in driven.param_groups for p in entry["params"]):
            # a base wrapped meanwhile shares its group dicts with the stack: its scheduler drives both
            shares = any(theirs is ours for theirs in driven.param_groups for ours in optimizer.param_groups)
            (bound if shares else elsewhere).append(candidate)
    return [type(scheduler).__name__ for scheduler in bound], [type(scheduler).__name__ for scheduler in elsewhere]


def _kinds_of(kind: type[Any]) -> Iterator[type[Any]]:
    yield kind
    for own in kind.__subclasses__():
        yield from _kinds_of(own)


def _rates(optimizer: Optimizer, bound: list[str], elsewhere: list[str]) -> Iterator[Finding]:
    for scheduler in elsewhere:
        yield Finding(
            "scheduler-of-another-optimizer",
            f"a {scheduler} drives another optimizer over the same parameters and has no effect on this one",
            "make the scheduler from this optimizer, after building or wrapping it",
        )
    scheduled = isinstance(optimizer, Stack) and any(
        "lr" in optimizer.schedules_of(entry) for entry in optimizer.param_groups
    )
    if scheduled and bound:
        yield Finding(
            "two-drivers",
            f"the stack's own schedule and a {bound[0]} both set lr, so the next step() raises ScheduleConflict",
            "remove one of the two, or give the client opt.scheduler(), which only reports",
        )
    default = default_rate(optimizer)
    rates = [entry.get("lr") for entry in optimizer.param_groups]
    if default is not None and not scheduled and not bound and all(number(rate) == default for rate in rates):
        base = optimizer.base if isinstance(optimizer, Stack) else optimizer
        yield Finding(
            "default-rate",
            f"every group has {type(base).__name__}'s default learning rate, {default:g}",
            "choose one for this problem; metaopt compare tries several",
        )


def default_rate(optimizer: Optimizer) -> float | None:
    """Return the learning rate that the optimizer's class has by default, or None where none was left unchanged."""
    if isinstance(optimizer, Stack) and _chose_rate(optimizer):
        return None
    base = optimizer.base if isinstance(optimizer, Stack) else optimizer
    try:
        declared = from_signature(type(base))
    except (TypeError, ValueError):  # a class without a signature that can be read
        return None
    default = declared["lr"].default if "lr" in declared else None
    return float(default) if isinstance(default, int | float) else None


def _chose_rate(stack: Stack) -> bool:
    """Tell whether the pipeline that the stack was built from gives the base a learning rate."""
    pipeline = () if stack.description is None else stack.description.pipeline
    return any(part.kind == "optimizer" and ("lr" in part.arguments or part.is_sequence) for part in pipeline)


def _cycles(stack: Stack) -> Iterator[Finding]:
    for wrapper in stack.wrappers:
        # an average that never moves the weights loses nothing at the end of a run
        only_averages = any(slot.kind == "start" for slot in wrapper.active_slots().values())
        if wrapper.acts_every is None or stack.total_steps is None or only_averages:
            continue
        key = f"{wrapper.label}.{wrapper.acts_every}"
        for every in sorted({entry[key] for entry in stack.param_groups}):
            rest = stack.total_steps % every
            if rest:
                yield Finding(
                    "ends-inside-cycle",
                    f"{wrapper.label} acts every {every} updates, and the run of {stack.total_steps} ends {rest} after "
                    f"the last time",
                    f"run {stack.total_steps - rest} or {stack.total_steps - rest + every} updates, "
                    f"or evaluate inside `with opt.averaged():`",
                )


def _schedules(stack: Stack) -> set[tuple[str, Schedule]]:
    """Return the schedules of all groups by the key that each drives; of a tuple those of its members."""
    found = {pair for entry in stack.param_groups for pair in stack.schedules_of(entry).items()}
    members = {(k, m) for k, s in found for m in (s.members if isinstance(s, TupleSchedule) else (s,))}
    return {(key, member) for key, member in members if isinstance(member, Schedule)}


def _lengths(stack: Stack) -> Iterator[Finding]:
    run = stack.total_steps
    for key, schedule in sorted(_schedules(stack), key=repr) if run is not None else ():
        assert run is not None
        length = schedule.length(run, run)
        # a warm-up that ends at its highest value is meant to stay there
        if length is not None and length < run and schedule(run, run) < max(schedule(t, run) for t in (0, length)):
            yield Finding(
                "schedule-shorter-than-run",
                f"the schedule of {key} ends after {length} of {run} updates and stays at {schedule(run, run):.4g}",
                "leave its steps out, so that it lasts until the end of the run",
            )
        elif length is not None and length > run:
            yield Finding(
                "schedule-longer-than-run",
                f"the schedule of {key} takes {length} updates, but the run has {run}, so it never reaches its end",
                "leave its steps out, so that it lasts until the end of the run",
            )
