"""Which path an update takes: one pass of the optional library, torch's fused kernel, or the base's own `step()`."""

import os
from collections.abc import Iterable, Sequence

import torch

from metaopt.engine.chain import Chain, ParamGroup
from metaopt.engine.fused.lists import LARGE, MANY, why_no_lists
from metaopt.engine.fused.recorded import rules_on_update
from metaopt.programs import compared, kernels, library
from metaopt.rules import Rule, rules_of
from metaopt.stack import Stack
from metaopt.wrapper import Wrapper

CHANGING = {"on_update", "after_updates"}
BEHIND = {*CHANGING, "after_update"}


def paths(stack: Stack) -> tuple[str, ...]:
    """Return one line for each base: which path its updates take from the second one on, and why not a faster one."""
    return tuple(dict.fromkeys(_path(stack, chain) for chain in stack.chains))


def _path(stack: Stack, chain: Chain) -> str:
    base = type(chain.base).__name__
    groups = chain.groups_in(stack.param_groups)
    reasons = (_why_its_own_step(group, len(groups) > 1) for group in groups)
    own = _why_no_direct_call(chain) or next(filter(None, reasons), None)
    if own is not None:
        return f"{base}.step(); torch's fused kernel is not called directly, because {own}"
    kernel = f"torch's fused kernel of {base}, called directly"
    dtypes = {p.dtype for group in groups for p in group["params"]}
    joined, left = _parts_that_join(chain)
    changing = chain.leading_on_update if not chain.needs_weights_before else ()
    if changing and not (set(changing) <= set(joined) and _are_rules(changing, groups)):
        return f"{kernel}, {_on_copies(changing)}"
    behind = f"; {left}" if left else ""
    labels = [wrapper.label for wrapper in joined]
    # an update waits for whatever part has rules, and is made by the library although none joins; so is one of many
    waits = any(w.has_rules for w in chain.written_behind) or any(len(group["params"]) >= MANY for group in groups)
    if not joined and (chain.needs_weights_before or not waits):
        return kernel + _about_a_factor(stack, chain, dtypes) + behind
    absent = _why_no_library(chain, joined, dtypes)
    if absent is None:
        sums = any(rule.graph.sums for wrapper in changing for rule in rules_of(type(wrapper)))
        more = ", and in the cache once more for sums over a tensor" if sums else ""
        return (
            f"{_and([base, *labels])} in one pass over memory{more}, by metaopt-kernels ({kernels().variant}){behind}"
        )
    if changing:
        kernel = f"{kernel}, {_on_copies(changing)}"
    if not joined:
        return kernel + behind
    return f"{kernel}; {_and(labels)} could join its pass over memory, but {absent}"


def _are_rules(changing: Sequence[Wrapper], groups: Sequence[ParamGroup]) -> bool:
    """Return whether all that wrappers do to an update are rules of elements, which may join the base's pass."""
    return all(rules_on_update(wrapper, group, 0) is not None for wrapper in changing for group in groups)


def _on_copies(changing: Sequence[Wrapper]) -> str:
    labels = [wrapper.label for wrapper in changing]
    return f"on copies of the weights, because {_and(labels)} {_act(labels, 'change')} the update"


# ---- the base's own step


def _why_no_direct_call(chain: Chain) -> str | None:
    if chain.fused_state is not None:
        return None
    if type(chain.base) in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
        return "its step() is not the one that torch wrote"
    return "that is done for torch's own Adam, AdamW and SGD only"


def _why_its_own_step(group: ParamGroup, is_one_of_many: bool) -> str | None:
    """Return why the base steps a group itself, naming the group; None if torch's kernel is called for it."""
    reason = why_no_lists(group, [p for p in group["params"] if p.requires_grad])
    where = f"of group {group['name']}: " if is_one_of_many and "name" in group else ""
    return None if reason is None else f"{where}{reason}"


# ---- the library


def _parts_that_join(chain: Chain) -> tuple[list[Wrapper], str]:
    """Return the parts behind the base that can join its pass over memory, and why those behind them cannot."""
    acting = [w for w in chain.written_behind if w.implemented_hooks() & BEHIND]
    if chain.needs_weights_before:
        reader = next(w for w in acting if chain.slots_of(w).uses_previous or w.implemented_hooks() & CHANGING)
        return [], f"{reader.label} compares the weights before the update and after it"
    joined: list[Wrapper] = []
    for wrapper in acting:
        if wrapper.takes_means and getattr(wrapper, "across", None) is not None:
            return joined, f"{wrapper.label} exchanges weights with other replicas"
        if not wrapper.has_rules:
            return joined, f"{wrapper.label} acts behind it, because it is not written as rules of elements"
        on_update = "on_update" in wrapper.implemented_hooks()
        if not all(_joins(chain, wrapper, rule, on_update) for rule in rules_of(type(wrapper))):
            return joined, f"{wrapper.label} acts behind it, because its rules need more than elements of their own"
        joined.append(wrapper)
    return joined, ""


def _joins(chain: Chain, wrapper: Wrapper, rule: Rule, on_update: bool) -> bool:
    """Return whether a rule may join: what the engine asks at each update, as far as it is known beforehand."""
    if (rule.graph.sums and not on_update) or _keeps_elsewhere(wrapper):
        return False
    given = {"param", "update", "grad"} if on_update else {"param"}
    kinds = {getattr(wrapper.slots.get(name), "kind", None) for name in rule.tensors if name not in given}
    if not kinds <= {"anchor", "start", "zeros"}:
        return False
    return "param" not in rule.graph.outputs or not chain.slots_of(wrapper).inner_anchor_keys


def _keeps_elsewhere(wrapper: Wrapper) -> bool:
    devices = [slot.device for slot in wrapper.active_slots().values() if slot.device is not None]
    return any(vars(wrapper).get(device, device) is not None for device in devices)


def _why_no_library(chain: Chain, joined: Iterable[Wrapper], dtypes: set[torch.dtype]) -> str | None:
    if library is None:
        return "metaopt-kernels is not installed (in a checkout: pip install ./kernels)"
    native = kernels()
    if native is None:
        off = os.environ.get(library.OFF) == "0"
        return f"{library.OFF}=0 turns metaopt-kernels off" if off else "metaopt-kernels has no build for this machine"
    kernel = "adam" if "step" in (chain.fused_state or ()) else "sgd"
    used = compared(symbol for w in joined for rule in rules_of(type(w)) for symbol in rule.graph.order)
    unknown = [d for d in dtypes if not native.knows(d, kernel, *used)]
    return f"metaopt-kernels does not compute torch's numbers in {str(unknown[0])[6:]}" if unknown else None


def _about_a_factor(stack: Stack, chain: Chain, dtypes: set[torch.dtype]) -> str:
    """Return what the library does without a part that joins: it divides large gradients in the base's pass."""
    before = any("on_gradients" in w.implemented_hooks() for w in chain.ordered)
    elements = sum(p.numel() for group in chain.groups_in(stack.param_groups) for p in group["params"])
    if chain.needs_weights_before or not before or elements <= LARGE or _why_no_library(chain, (), dtypes) is not None:
        return ""
    return f"; a factor of the gradients is taken in the same pass, by metaopt-kernels ({kernels().variant})"


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _act(names: list[str], verb: str) -> str:
    return verb if len(names) > 1 else f"{verb}s"
