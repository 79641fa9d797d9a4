"""Parameters as a user gives them, and named groups of them chosen by shell globs."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch

from metaopt.engine.run import NO_DECAY
from metaopt.errors import ParameterError, did_you_mean

Group = dict[str, Any]


def groups(
    model: torch.nn.Module, rules: Mapping[str, Mapping[str, Any]] | None = None, *, no_decay: str | None = None
) -> list[Group]:
    """Return named parameter groups of a module, chosen by shell globs on parameter names; the first match wins.

    `groups(model, {"*.bias": dict(weight_decay=0), "head.*": dict(lr_scale=0.1)})` makes a group per glob, named by
    it, and one called "rest" for what none matches. `no_decay="1d"` gives parameters of at most one dimension
    (biases, norms) `weight_decay=0`, in every group. A decay of zero is that of the whole stack: of the base, and of
    every wrapper that has one. Raises ParameterError for a glob that matches nothing.
    """
    if no_decay not in (None, "1d"):
        raise ParameterError(f"groups: no_decay={no_decay!r} is not allowed; use '1d' or None")
    if not isinstance(model, torch.nn.Module):
        raise ParameterError(f"groups: takes a module, whose parameters have names, not {type(model).__name__}")
    if rules is not None and not (isinstance(rules, Mapping) and all(isinstance(r, Mapping) for r in rules.values())):
        raise ParameterError(f"groups: rules are a dict of dicts, {{'*.bias': dict(lr_scale=0.1)}}, not {rules!r:.60}")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ParameterError("groups: the model has no parameter that requires a gradient")
    chosen: dict[str, list[tuple[str, torch.Tensor]]] = {glob: [] for glob in rules or {}}
    rest: list[tuple[str, torch.Tensor]] = []
    for name, p in named:
        glob = next((glob for glob in chosen if fnmatchcase(name, glob)), None)
        (rest if glob is None else chosen[glob]).append((name, p))
    for glob, members in chosen.items():
        if not members:
            names = [name for name, _ in named]
            raise ParameterError(
                f"groups: the glob {glob!r} matches no parameter that an earlier glob left.{did_you_mean(glob, names)} "
                f"The first parameters are called {', '.join(names[:5])}"
            )
    result: list[Group] = []
    for glob, members in (*chosen.items(), ("rest", rest)):
        settings = dict((rules or {}).get(glob, {}))
        result += _split_by_decay(glob, members, settings, no_decay)
    return result


def _split_by_decay(name: str, members: list[Any], settings: Group, no_decay: str | None) -> list[Group]:
    if not members:
        return []
    if no_decay is None or "weight_decay" in settings:
        return [_group(name, members, settings)]
    flat = [(n, p) for n, p in members if p.dim() <= 1]
    full = [(n, p) for n, p in members if p.dim() > 1]
    found = []
    if full:
        found.append(_group("decay" if name == "rest" else name, full, settings))
    if flat:
        label = "no_decay" if name == "rest" else f"{name} no_decay"
        found.append(_group(label, flat, {**settings, "weight_decay": 0.0}))
    return found


def _group(name: str, members: list[tuple[str, torch.Tensor]], settings: Group) -> Group:
    spared = {NO_DECAY: True} if settings.get("weight_decay") == 0 else {}
    named = {"params": [p for _, p in members], "param_names": [n for n, _ in members], "name": name}
    return {**named, **settings, **spared}


def as_groups(model_or_params: Any) -> list[Group]:
    """Return group dicts, newly made, for a module, parameters, (name, parameter) pairs or group dicts.

    Raises ParameterError for anything else, an empty list, or a parameter in two groups.
    """
    if isinstance(model_or_params, torch.nn.Module):
        members = [(name, p) for name, p in model_or_params.named_parameters() if p.requires_grad]
        if not members:
            raise ParameterError(f"{type(model_or_params).__name__} has no parameter that requires a gradient")
        return [{"params": [p for _, p in members], "param_names": [n for n, _ in members]}]
    if isinstance(model_or_params, torch.Tensor):
        raise ParameterError("one tensor was given as the parameters: give a list, [tensor], or the module")
    if not isinstance(model_or_params, Iterable):
        raise ParameterError(f"{type(model_or_params).__name__} is no module and no iterable of parameters")
    items = list(model_or_params)
    if not items:
        raise ParameterError("the parameter list is empty: was the generator model.parameters() used up before?")
    if isinstance(items[0], dict):
        found = [_named_apart(item, position) for position, item in enumerate(items)]
    else:
        found = [_named_apart({"params": items}, None)]
    _check_members(found)
    return found


def _named_apart(item: Any, position: int | None) -> Group:
    where = "the parameters" if position is None else f"group {position}"
    if not isinstance(item, dict) or "params" not in item:
        raise ParameterError(f"{where}: a group is a dict with the key 'params', not {item!r:.60}")
    group = dict(item)
    members = [group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"])
    if members and all(isinstance(member, tuple) for member in members):
        group["param_names"] = [name for name, _ in members]
        members = [p for _, p in members]
    group["params"] = members
    for member in members:
        if not isinstance(member, torch.Tensor):
            raise ParameterError(f"{where}: {type(member).__name__} is no tensor; names go with all parameters or none")
    return group


def _check_members(found: list[Group]) -> None:
    seen: dict[int, str] = {}
    for position, group in enumerate(found):
        name = str(group.get("name", position))
        for p in group["params"]:
            if id(p) in seen:
                raise ParameterError(
                    f"a parameter of shape {tuple(p.shape)} stands in group {seen[id(p)]} and in {name}"
                )
        seen.update((id(p), name) for p in group["params"])
    if not seen:
        raise ParameterError("the parameter groups are all empty")
