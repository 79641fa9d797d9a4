"""What is refused when a stack is made: parts that cannot work together. Reads parts and groups, and changes nothing.

What a group must not hold is refused when it joins the run (`engine.run.groups`).
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch

from metaopt.engine.chain import Chain, ParamGroup
from metaopt.engine.param_state.scratch import scratch_step
from metaopt.engine.structure import Structure
from metaopt.errors import HyperparameterError, SpecError
from metaopt.schedule import Schedule, validate_values
from metaopt.wrapper import BEFORE_BASE, Wrapper

LABEL = re.compile(r"[a-z_][a-z0-9_]*")


def validate(structure: Structure, groups: Sequence[ParamGroup]) -> None:
    """Raise SpecError or HyperparameterError for parts that cannot work together."""
    _validate_order(structure.wrappers)
    for chain in structure.chains:
        if chain.name and chain.needs_closure:
            raise SpecError(
                f"the part {chain.name!r}: {type(chain.base).__name__} evaluates the loss itself, which all parts "
                f"share: it cannot be one of several bases"
            )
        _validate_base(chain.base)
        validate_labels(chain.ordered)
        for wrapper in chain.ordered:
            wrapper.validate()
            _validate_exchange(chain, wrapper)
            _validate_evaluation(chain, wrapper)
            _validate_places(chain, wrapper)
        _validate_moments(chain)
        _validate_resets(chain, groups)
        _validate_schedules({**chain.schedules, **structure.schedules}, chain, structure.total_steps)


def _validate_order(wrappers: Sequence[Wrapper]) -> None:
    """Refuse a wrapper that evaluates the loss behind one that works on the gradients of that evaluation."""
    for position, wrapper in enumerate(wrappers):
        hooks = [(w.label, w.implemented_hooks()) for w in wrappers[:position]]
        earlier = [label for label, names in hooks if "on_gradients" in names and "around" not in names]
        if "around" in wrapper.implemented_hooks() and earlier:
            raise SpecError(
                f"{wrapper.label} makes the gradients that {earlier[0]} works on: write it before {earlier[0]}"
            )


def _validate_base(base: torch.optim.Optimizer) -> None:
    """Refuse a base that hands the work to another optimizer: the stack would see neither its state nor its updates."""
    for name, value in vars(base).items():
        if isinstance(value, torch.optim.Optimizer):
            outer, inner = type(base).__name__, type(value).__name__
            raise SpecError(
                f"{outer} cannot be a base: it keeps {inner} in .{name}, whose state and updates a stack around it "
                f"would not see. Put the stack inside: give {outer} the stack, or a factory of it, in place of {inner}"
            )


def _validate_evaluation(chain: Chain, wrapper: Wrapper) -> None:
    hooks = wrapper.implemented_hooks()
    owns = "around" in hooks or (wrapper.observes and "observe_loss" in hooks and wrapper.looks_with("observe_loss"))
    if chain.needs_closure and (owns or wrapper.may_skip_updates):
        what = "evaluates the loss itself" if owns else "skips updates"
        raise SpecError(
            f"{wrapper.label} {what}, and {type(chain.base).__name__} evaluates the loss several times within one "
            f"update: the two do not go together"
        )
    if chain.needs_closure and (hooks & {"on_update", "after_updates"} or chain.slots_of(wrapper).uses_previous):
        raise SpecError(
            f"{wrapper.label} works on one update and its gradient, and {type(chain.base).__name__} makes an update of "
            f"several gradients: the two do not go together"
        )
    if wrapper in chain.wrappers and chain.name and (owns or wrapper.may_skip_updates):
        what = "evaluates the loss, which all parts share" if owns else "skips updates, which all parts count"
        raise SpecError(f"{wrapper.label} {what}: write it outside, before the base of the whole stack")


def _validate_places(chain: Chain, wrapper: Wrapper) -> None:
    """Refuse a wrapper that is written before the base and works on its update."""
    hooks = wrapper.implemented_hooks()
    if wrapper.runs_before_base() and (hooks & {"on_update", "after_updates"} or chain.slots_of(wrapper).uses_previous):
        raise SpecError(
            f"{wrapper.label} acts before the base ({', '.join(sorted(hooks & BEFORE_BASE))}) and on its update: "
            f"make two wrappers of it, one on each side of the base"
        )


def _validate_exchange(chain: Chain, wrapper: Wrapper) -> None:
    """Refuse settings of an exchange between replicas that would be ignored, or that do not fit its cycle."""
    if wrapper.anchor_across is None or wrapper.acts_every is None:
        return
    values = vars(wrapper)
    unused = [name for name in ("compress", "fragments", "delay", "blend") if name in wrapper.arguments]
    if not wrapper.takes_means:
        if unused:
            raise HyperparameterError(f"{wrapper.label}: {unused[0]} needs across='replicas': give both, or none")
        return
    k, fragments, delay = values[wrapper.acts_every], values["fragments"], values["delay"]
    if fragments > k or delay >= k:
        name, most = ("fragments", k) if fragments > k else ("delay", k - 1)
        raise HyperparameterError(
            f"{wrapper.label}: {name} must be at most {most} with {wrapper.acts_every}={k}, got {values[name]}"
        )
    if "blend" in unused and not delay:
        raise HyperparameterError(f"{wrapper.label}: blend needs a delay of 1 or more: give both, or none")
    steps = [w for w in chain.ordered if w.spans_steps and w.spans_steps not in w.hyperparameters]
    if steps:
        raise SpecError(
            f"{steps[0].label} must name in spans_steps the hyperparameter that says how many steps make one update: "
            f"{wrapper.label} counts steps, which all replicas have in common"
        )


def _validate_moments(chain: Chain) -> None:
    """Refuse a second wrapper of one class that acts on the base's moments: only the innermost may."""
    inner: dict[type, Wrapper] = {}
    for wrapper in (*chain.wrappers, *(w for w in chain.ordered if w not in chain.wrappers)):
        needs_moments = chain.slots_of(wrapper).keeps_moments or wrapper.resets_base_state()
        if needs_moments and chain.needs_closure:
            raise SpecError(
                f"{wrapper.label} acts on the base's moments, but the state of {type(chain.base).__name__} "
                f"holds lists: use pullback_momentum='none'"
            )
        if needs_moments and type(wrapper) in inner:
            raise SpecError(
                f"{wrapper.label} acts on the base's moments, but {inner[type(wrapper)].label} is nearer the base: "
                f"only the innermost may"
            )
        inner.setdefault(type(wrapper), wrapper)


def _validate_resets(chain: Chain, groups: Sequence[ParamGroup]) -> None:
    group = next((g for g in groups if chain.has_group(g) and any(p.requires_grad for p in g["params"])), None)
    if not chain.resets or group is None:
        return
    label, base = chain.resets[0].label, type(chain.base).__name__
    smallest = min((p for p in group["params"] if p.requires_grad), key=torch.numel)
    try:
        _, _, counted = scratch_step(chain, group, smallest)
    except Exception as error:  # whatever a class from elsewhere raises for settings that it cannot step with
        raise SpecError(
            f"{label} resets the state of {base}, which must therefore accept zero gradients, but it raised "
            f"{type(error).__name__}: {error}; change its settings, or use pullback_momentum='none'"
        ) from error
    if counted:
        raise SpecError(
            f"{label} resets the state of {base}, which counts its updates in its groups ({', '.join(counted)}): the "
            f"count goes on, and bias correction would be that of a late update; use pullback_momentum='none'"
        )


def _validate_schedules(schedules: Mapping[str, Schedule], chain: Chain, total_steps: int | None) -> None:
    for key, schedule in schedules.items():
        if key not in chain.hyperparameters:
            continue
        wrapper, name = chain.hyperparameters[key]
        validate_values(schedule, wrapper.hyperparameters[name], wrapper.label, total_steps)


def validate_labels(wrappers: Iterable[Wrapper]) -> None:
    """Raise SpecError for a label that is malformed, reserved or taken."""
    seen: set[str] = set()
    for wrapper in wrappers:
        label = wrapper.label
        if not LABEL.fullmatch(label):
            raise SpecError(f"a label must be lower-case letters, digits and underscores, got {label!r}")
        if label == "metaopt":
            raise SpecError("label 'metaopt' is reserved: choose another")
        if label in seen:
            raise SpecError(f"two parts are labelled {label!r}: give one of them another with label=")
        seen.add(label)
