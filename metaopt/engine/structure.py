"""What follows from the parts of a stack and never changes: its chains, who acts when, and what is refused."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from metaopt.engine.chain import Chain, ParamGroup
from metaopt.engine.multi_base import MultiBase
from metaopt.errors import HyperparameterError, SpecError, did_you_mean
from metaopt.group_entries import NO_DECAY, is_decay, mark_no_decay, take_value
from metaopt.hyperparameters import from_signature
from metaopt.schedule import Schedule, as_schedule, validate_values
from metaopt.space import find_spaces
from metaopt.wrapper import BEFORE_BASE, Wrapper

LABEL = re.compile(r"[a-z_][a-z0-9_]*")


@dataclass(frozen=True)
class PlacedWrapper:
    """A wrapper and the chain that it acts on; None: it acts around all chains."""

    wrapper: Wrapper
    chain: Chain | None


class Structure:
    """The chains of a stack, its own wrappers and schedules, and the wrappers of each phase in the order of acting."""

    def __init__(
        self,
        base: torch.optim.Optimizer,
        wrappers: Sequence[Wrapper],
        schedules: Mapping[str, Schedule],
        total_steps: int | None,
        fused_by_default: bool,
    ) -> None:
        self.wrappers = tuple(wrappers)
        self.schedules = dict(schedules)
        self.total_steps = total_steps
        self.fused_by_default = fused_by_default
        single = Chain(base, outer=self.wrappers, fused_by_default=fused_by_default)
        self.chains: tuple[Chain, ...] = base.chains if isinstance(base, MultiBase) else (single,)
        self.multi_base = base if isinstance(base, MultiBase) else None
        self._by_name = {chain.name: chain for chain in self.chains if chain.name}
        outer = [PlacedWrapper(wrapper, None) for wrapper in self.wrappers]
        inner = [PlacedWrapper(wrapper, chain) for chain in self.chains for wrapper in chain.wrappers]
        self.around = tuple(w for w in self.wrappers if "around" in w.implemented_hooks())
        self.on_gradients = _with_hook("on_gradients", (*outer, *inner))
        self.before_update = _with_hook("before_update", (*outer, *inner))
        self.on_record = _with_hook("on_record", (*outer, *inner))
        looking = [p for p in (*outer, *inner) if p.wrapper.observes]
        self.observers = tuple(looking)
        self.gradient_observers = _looking_with("observe_gradients", looking)
        self.loss_observers = _looking_with("observe_loss", looking)
        behind = {"on_update", "after_updates", "after_update"}
        self.acts_behind = tuple(p for p in (*inner, *outer) if p.wrapper.implemented_hooks() & behind)
        self.exchanges = tuple(p for p in self.acts_behind if p.wrapper.takes_means)
        self.needs_closure = any(chain.needs_closure for chain in self.chains)
        self.keeps_state = any(chain.slots or chain.moment_slots for chain in self.chains)
        self.keeps_early_state = any(chain.early_keys for chain in self.chains)
        self.needs_weights_before = any(chain.needs_weights_before for chain in self.chains)
        self.changes_updates = any(chain.leading_on_update for chain in self.chains)

    def chain_of(self, group: ParamGroup) -> Chain:
        """Return the chain that a group belongs to."""
        return self._by_name[group["metaopt.part"]] if self._by_name else self.chains[0]

    def schedules_of(self, group: ParamGroup) -> dict[str, Schedule]:
        """Return the schedules that drive a group's entries, by key."""
        return {**self.chain_of(group).schedules, **self.schedules} if self._by_name else self.schedules

    def chains_of(self, placed: PlacedWrapper) -> tuple[Chain, ...]:
        """Return the chains that a wrapper acts on."""
        return self.chains if placed.chain is None else (placed.chain,)

    def labels(self) -> list[str]:
        """Return the labels of all wrappers."""
        return list(dict.fromkeys(label for chain in self.chains for label in chain.labelled))

    def averages(self) -> list[str]:
        """Return the labels of the wrappers that `averaged()` can show."""
        wrappers = [w for chain in self.chains for w in chain.ordered if "averaged" in w.implemented_hooks()]
        return list(dict.fromkeys(wrapper.label for wrapper in wrappers))

    def default_average(self) -> str | None:
        """Return the average that is written last, outermost: it has seen what the others have done.

        None if the bases of a partition have different ones.
        """
        own = [[w.label for w in chain.ordered if "averaged" in w.implemented_hooks()] for chain in self.chains]
        last = {labels[-1] for labels in own if labels}
        return last.pop() if len(last) == 1 else None


def fights(
    chains: Iterable[Chain], groups: Sequence[ParamGroup], *, only_modes: bool = False
) -> list[tuple[Chain, list[str]]]:
    """Return the bases whose next step undoes moves of the weights, with the labels of the wrappers that move them.

    `only_modes`: try only bases with `train()` and `eval()`, which a schedule-free one has; others cost time.
    """
    found = []
    for chain in chains:
        movers = [w.label for w in chain.ordered if w.moves_weights()]
        group = next(iter(chain.groups_in(list(groups))), None)
        with_modes = callable(getattr(chain.base, "eval", None))
        if movers and group is not None and (with_modes or not only_modes) and chain.undoes_moves(group):
            found.append((chain, movers))
    return found


def _with_hook(name: str, placed: Sequence[PlacedWrapper]) -> tuple[PlacedWrapper, ...]:
    return tuple(p for p in placed if name in p.wrapper.implemented_hooks())


def _looking_with(hook: str, placed: Sequence[PlacedWrapper]) -> tuple[PlacedWrapper, ...]:
    return tuple(p for p in placed if hook in p.wrapper.implemented_hooks() and p.wrapper.looks_with(hook))


# ---- what is refused


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
        _, _, counted = chain.scratch_step(group, smallest)
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


def validate_group(
    structure: Structure,
    group: ParamGroup,
    position: int,
    given: Collection[str],
    others: Sequence[ParamGroup],
    updates: int | None,
) -> None:
    """Raise HyperparameterError for an entry that no part has, or that is out of bounds.

    `given` are the entries that the user has set, not the base's defaults; they are read here (see `take_value`).
    `others` are the groups of the run, `updates` is the count of a run that has begun.
    """
    where = f"group {group.get('name', position)}"
    chain = structure.chain_of(group)
    schedules, known = structure.schedules_of(group), chain.hyperparameters
    if group.get("differentiable") and chain.ordered:
        raise HyperparameterError(
            f"{where}: differentiable=True: {chain.ordered[0].label} changes tensors in place and cannot be "
            f"differentiated through; leave one of the two out"
        )
    if chain.base.defaults.get("weight_decay"):
        mark_no_decay(group)
    for key in known if group.get(NO_DECAY) else ():
        if is_decay(known[key][0].hyperparameters[known[key][1]]):
            group.setdefault(key, 0.0)
            given = {*given, key}
    for key, value in list(group.items()):
        place, declared = where, None
        if key in known:
            wrapper, name = known[key]
            place, declared = f"{where}, {wrapper.label}", wrapper.hyperparameters[name]
            is_set = key in given
        elif "." in key and not key.startswith("metaopt."):
            raise HyperparameterError(f"{where}: no part of this stack has {key!r}.{did_you_mean(key, known)}")
        else:
            # the base validates its constants itself
            is_set = key in chain.base.defaults and (
                (key in given and key in schedules)
                or isinstance(as_schedule(value), Schedule)
                or any(find_spaces(value, key))
            )
            declared = from_signature(type(chain.base)).get(key) if is_set else None
        if is_set:
            shared, run = schedules.get(key), structure.total_steps
            take_value(group, key, declared, where=place, shared=shared, total_steps=run, updates=updates)
        if key in known and declared is not None and not declared.per_group:
            _validate_shared(group, key, *known[key], where, others)


def _validate_shared(
    group: ParamGroup, key: str, wrapper: Wrapper, name: str, where: str, others: Sequence[ParamGroup]
) -> None:
    # before the first group is complete the wrapper's own value is what the others will get
    values = [other.get(key, getattr(wrapper, name)) for other in others] or [group[key]]
    if any(value != group[key] for value in values):
        raise HyperparameterError(
            f"{where} sets {key}={group[key]!r}, but {wrapper.label} acts on all groups at once, where it is "
            f"{values[0]!r}: give it in the stack, for all"
        )


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
