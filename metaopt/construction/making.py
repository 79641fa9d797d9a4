"""Making bases: one over all groups, or one for each part that a partitioner deals them out to."""

from collections.abc import Mapping
from typing import Any

import torch

from metaopt.construction.grouping import Group, same_tensor
from metaopt.engine.chain import PART, Chain
from metaopt.engine.fused.probes import has_fused_kernel
from metaopt.engine.multi_base import MultiBase, Partitioner
from metaopt.errors import HyperparameterError, ParameterError, SpecError, did_you_mean
from metaopt.group_entries import NO_DECAY, TIED, take_value
from metaopt.misuse.no_hook import warn_of_no_hook
from metaopt.refusals import validate_labels
from metaopt.registry import registry
from metaopt.schedule import Schedule
from metaopt.specs.pipeline import Part, Pipeline
from metaopt.specs.spaces import refuse_spaces
from metaopt.wrapper import Wrapper

# what a group may hold besides hyperparameters of its parts
GROUP_KEYS = frozenset({"params", "param_names", "name", "lr_scale"})


def arrange(pipeline: Pipeline) -> tuple[Part, tuple[Wrapper, ...]]:
    """Return the base and the wrappers in written order; raise SpecError for an order that cannot work, or a space."""
    refuse_spaces(pipeline)
    bases = [position for position, part in enumerate(pipeline) if part.kind == "optimizer"]
    if len(bases) != 1:
        names = ", ".join(pipeline.parts[position].name for position in bases)
        raise SpecError(
            f"a stack has one base, this one has {len(bases)} ({names}): keep one of them"
            if bases
            else "a stack needs a base optimizer, such as adamw(lr=3e-4); metaopt.wrap takes one that exists already"
        )
    wrappers = []
    for position, part in enumerate(pipeline):
        if part.kind == "optimizer":
            continue
        wrapper = part.build_wrapper()
        base = pipeline.parts[bases[0]].name
        if wrapper.observes:
            wrappers.append(wrapper)
            continue
        if wrapper.runs_before_base() and position > bases[0]:
            raise SpecError(f"{wrapper.label} works on what {base} has used by then: write it before {base}")
        if not wrapper.runs_before_base() and position < bases[0]:
            raise SpecError(f"{wrapper.label} works on updated parameters: write it behind {base}")
        wrappers.append(wrapper)
    validate_labels(tuple(wrappers))
    warn_of_no_hook(wrappers)
    return pipeline.parts[bases[0]], tuple(wrappers)


def scheduled(base: Part | None, wrappers: tuple[Wrapper, ...]) -> dict[str, Schedule]:
    found = {} if base is None else {k: v for k, v in base.arguments.items() if isinstance(v, Schedule)}
    for wrapper in wrappers:
        own = {name: getattr(wrapper, name) for name in wrapper.hyperparameters}
        found.update({f"{wrapper.label}.{k}": v for k, v in own.items() if isinstance(v, Schedule)})
    return found


def make_base(
    groups: list[Group],
    base: Part,
    schedules: Mapping[str, Schedule],
    total_steps: int | None,
    *,
    around: tuple[Wrapper, ...] = (),
    exact: bool = False,
) -> tuple[torch.optim.Optimizer, bool]:
    """Return the base over these groups, and whether its fused kernel was our choice. Raises HyperparameterError.

    `around` are the wrappers that may adapt its class; `exact` leaves the choice of kernel to torch.
    """
    _check_groups(groups, base, schedules, total_steps)
    given = dict(base.arguments)
    for name, hyperparameter in base.hyperparameters.items():
        if hyperparameter.required and name not in given:
            raise HyperparameterError(f"{base.name} needs {name}: it has no default")
    for name, value in given.items():
        if isinstance(value, Schedule):
            given[name] = value.curve(total_steps, total_steps)(0)
    kind = base.target
    for wrapper in around:
        kind = wrapper.adapt_base(kind)
    fused = kind is base.target and not exact and _fuse(groups, base, given)
    try:
        return kind(groups, **given), fused
    except Exception as error:  # what a class from elsewhere raises for what it refuses is its own choice
        reason = str(error) if isinstance(error, TypeError | ValueError | RuntimeError) else repr(error)
        if kind is base.target and any(p.dim() > 2 for group in groups for p in group["params"]):
            adapting = [entry.name for entry in registry.entries("wrapper") if _adapts_base(entry.target)]
            reason += "".join(f". Written before it, {name} hands it matrices" for name in adapting)
        raise HyperparameterError(f"{base.name}: {reason}") from error


def _adapts_base(wrapper: type[Wrapper]) -> bool:
    return getattr(wrapper, "adapt_base", Wrapper.adapt_base) is not Wrapper.adapt_base


def make_partition(
    groups: list[Group], partition: Part, outer: tuple[Wrapper, ...], total_steps: int | None, exact: bool = False
) -> MultiBase:
    """Return the bases of all parts as one, each over the parameters that the partitioner assigns to it.

    Raises ParameterError for a parameter that no part takes and for a part that takes none.
    """
    if "parts" not in partition.arguments:
        raise SpecError(f"{partition.name} needs parts: a dict of pipelines by name, such as {{'*': adamw(lr=3e-4)}}")
    partitioner: Partitioner = partition.target(**partition.arguments)
    chains = []
    for part, members in _assigned(groups, partitioner, partition.name).items():
        pipeline: Pipeline = partitioner.parts[part]
        base_part, wrappers = arrange(pipeline)
        if base_part.is_partition or base_part.is_sequence:
            raise SpecError(
                f"{partition.name}: the part {part!r} needs a plain base, {base_part.name} is made of others: "
                f"write all parts in one"
            )
        own = scheduled(base_part, wrappers)
        base, fused = make_base(members, base_part, own, total_steps, around=(*outer, *wrappers), exact=exact)
        for entry in base.param_groups:
            entry[PART] = part
        chains.append(Chain(base, wrappers, own, outer=outer, name=part, fused_by_default=fused))
    return MultiBase(chains, partitioner)


def _assigned(groups: list[Group], partitioner: Partitioner, where: str) -> dict[str, list[Group]]:
    """Return the groups of each part, in the order of the parts; a group whose members part is split."""
    assigned: dict[str, list[Group]] = {part: [] for part in partitioner.parts}
    tied: dict[str | None, str] = {}
    for position, group in enumerate(groups):
        names = group.get("param_names")
        if names is None:
            raise ParameterError(
                f"{where} chooses by name, and the parameters have none: give the model, model.named_parameters() "
                f"or metaopt.groups(model, ...)"
            )
        members: dict[str, list[tuple[str, torch.Tensor]]] = {}
        for name, p in zip(names, group["params"], strict=True):
            # a tied parameter goes to the first part that takes it under any of its names
            aliases = [name, *group.get(TIED, {}).get(name, ())]
            takers = {partitioner.branch_of(alias, p): alias for alias in aliases}
            part = next((part for part in assigned if part in takers), None)
            if part is None:
                raise ParameterError(
                    f"{where}: no part takes {name} of shape {tuple(p.shape)}: add a pattern for it, such as '*'"
                )
            tied.update((other, same_tensor(takers[other], aliases)) for other in takers if other not in (part, None))
            members.setdefault(part, []).append((name, p))
        called = group.get("name", None if len(groups) == 1 else str(position))
        for part, chosen in members.items():
            own = {"params": [p for _, p in chosen], "param_names": [n for n, _ in chosen]}
            assigned[part].append({**group, **own, "name": part if called is None else f"{called} {part}"})
    empty = [part for part, members in assigned.items() if not members]
    if empty:
        raise ParameterError(
            f"{where}: {empty[0]!r} matches no parameter that an earlier part left"
            f"{f' ({tied[empty[0]]})' if empty[0] in tied else ''}: fix or remove the pattern"
        )
    return assigned


def _check_groups(groups: list[Group], base: Part, schedules: Mapping[str, Schedule], total_steps: int | None) -> None:
    hyperparameters = base.hyperparameters
    for position, group in enumerate(groups):
        where = f"group {group.get('name', position)}"
        if group.get(NO_DECAY) and "weight_decay" not in hyperparameters:
            del group["weight_decay"]  # such a base decays nothing anyway
        for key in list(group):
            if key in hyperparameters:
                take_value(
                    group,
                    key,
                    hyperparameters[key],
                    where=f"{where}, {base.name}",
                    shared=schedules.get(key),
                    total_steps=total_steps,
                )
            elif "." not in key and key not in GROUP_KEYS:
                raise HyperparameterError(
                    f"{where}: no part of this stack has {key!r}.{did_you_mean(key, hyperparameters)}"
                )


def _fuse(groups: list[Group], base: Part, given: dict[str, Any]) -> bool:
    """Choose the fused kernel where torch has one for every parameter, unless the user chose how to run."""
    if "fused" not in base.hyperparameters or not base.target.__module__.startswith("torch.optim."):
        return False
    # capturable and the rest say what the kernel must allow, not which it is: the constructor below refuses it or not
    chosen = {"fused", "foreach"} & (given.keys() | {key for group in groups for key in group})
    if chosen or any(group.get("differentiable") for group in groups):
        return False
    if any(isinstance(value, torch.Tensor) for value in given.values()):
        return False
    try:
        base.target([torch.zeros(1, requires_grad=True)], **given, fused=True)
    except Exception:  # this class, or this choice of hyperparameters, has no fused kernel
        return False
    if not has_fused_kernel(base.target, [p for group in groups for p in group["params"]]):
        return False
    given["fused"] = True
    return True
