"""Parameters as a user gives them, and named groups of them chosen by shell globs."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

import torch

from metaopt.construction.layers import layers_by_patterns, layers_in_order
from metaopt.errors import ParameterError, did_you_mean
from metaopt.group_entries import TIED, mark_no_decay
from metaopt.misuse.left_out import LeftOut

Group = dict[str, Any]
_Member = tuple[list[str], torch.Tensor]  # all names of a parameter, and the parameter


class ModelGroups(list[Group]):
    """The groups of a model, which is not held; `left_out` are its frozen parameters, which are in none."""

    def __init__(self, model: torch.nn.Module, left_out: Sequence[tuple[str, torch.Tensor]]) -> None:
        super().__init__()
        self.model = weakref.ref(model)
        self.left_out = left_out

    def __reduce__(self) -> Any:  # a copy is of other parameters
        return list, (list(self),)


def module_of(model_or_params: Any) -> torch.nn.Module | None:
    """Return the module that parameters were given by, if they were given by one."""
    if isinstance(model_or_params, ModelGroups):
        return model_or_params.model()
    return model_or_params if isinstance(model_or_params, torch.nn.Module) else None


def groups(
    model: torch.nn.Module,
    rules: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    no_decay: str | None = None,
    layer_decay: float | None = None,
    layers: Sequence[str] | None = None,
) -> list[Group]:
    """Return named parameter groups of a module, chosen by shell globs on parameter names; the first match wins.

    `groups(model, {"*.bias": dict(weight_decay=0), "head.*": dict(lr_scale=0.1)})` makes a group per glob, named by
    it, and one called "rest" for what none matches. A tied parameter is known by all its names. `no_decay="1d"` gives
    parameters of at most one dimension (biases, norms) `weight_decay=0`, in every group. A decay of zero is that of the
    whole stack: of the base, and of every wrapper that has one.

    `layer_decay=0.75` multiplies the learning rate of each layer by 0.75 to the power of its distance from the last
    layer (arXiv:2106.08254). Layers are found in the order of the modules: what comes before the numbered blocks is the
    first layer, each block is one, what comes after is the last. `layers` gives them by globs instead, from the input
    to the output; a `#` in a glob stands for a number, and each number is a layer:
    `layers=["*embed*", "blocks.#.*", "*"]`.

    Raises ParameterError for a glob that matches nothing, and for a parameter that belongs to no layer.
    """
    if no_decay not in (None, "1d"):
        raise ParameterError(f"groups: no_decay must be '1d' or None, got {no_decay!r}")
    if not isinstance(model, torch.nn.Module):
        raise ParameterError(f"groups: takes a module, whose parameters have names, not {type(model).__name__}")
    if rules is not None and not (isinstance(rules, Mapping) and all(isinstance(r, Mapping) for r in rules.values())):
        raise ParameterError(f"groups: rules are a dict of dicts, {{'*.bias': dict(lr_scale=0.1)}}, not {rules!r:.60}")
    names = _names(model)
    if not names:
        raise ParameterError("groups: the model has no parameter that requires a gradient")
    scales = _layer_scales(names, layer_decay, layers)
    chosen: dict[str, list[_Member]] = {glob: [] for glob in rules or {}}
    rest: list[_Member] = []
    for p, own in names.items():
        glob = next((glob for glob in chosen if any(fnmatchcase(name, glob) for name in own)), None)
        (rest if glob is None else chosen[glob]).append((own, p))
    for glob, members in chosen.items():
        if not members:
            raise ParameterError(_matches_nothing(glob, chosen, names))
    result = ModelGroups(model, _frozen(model))
    for glob, members in (*chosen.items(), ("rest", rest)):
        settings = dict((rules or {}).get(glob, {}))
        for layer, scale, part in _split_by_layer(members, scales):
            scaled = settings if layer is None else {**settings, "lr_scale": settings.get("lr_scale", 1.0) * scale}
            called = glob if layer is None else f"layer {layer}" if glob == "rest" else f"{glob} layer {layer}"
            result += _split_by_decay(called, part, scaled, no_decay)
    return result


def _names(model: torch.nn.Module) -> dict[torch.Tensor, list[str]]:
    """Return all names of every parameter that is trained, the first one first: a tied parameter has several."""
    names: dict[torch.Tensor, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if p.requires_grad:
            names.setdefault(p, []).append(name)
    return names


def _frozen(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if not p.requires_grad]


def find_left_out(model_or_params: Any) -> LeftOut | None:
    """Return the parameters of a model that `as_groups` or `groups` left out because they are frozen, if any."""
    is_model = isinstance(model_or_params, torch.nn.Module)
    named = _frozen(model_or_params) if is_model else getattr(model_or_params, "left_out", ())
    return LeftOut(named) if named else None


def _matches_nothing(glob: str, globs: Iterable[str], names: Mapping[torch.Tensor, list[str]]) -> str:
    for own in names.values():
        for name in own:
            if fnmatchcase(name, glob):
                taker = next(other for other in globs if any(fnmatchcase(alias, other) for alias in own))
                tied = "" if len(own) == 1 else f"; {same_tensor(name, own)}"
                return f"groups: the earlier glob {taker!r} takes all parameters that {glob!r} matches{tied}"
    every = [name for own in names.values() for name in own]
    return (
        f"groups: the glob {glob!r} matches no parameter.{did_you_mean(glob, every)} "
        f"The first parameters are called {', '.join(every[:5])}"
    )


def same_tensor(name: str, names: Sequence[str]) -> str:
    """Return in words that a name belongs to a tied parameter."""
    return f"{name} is the same tensor as {' and '.join(other for other in names if other != name)}"


def _layer_scales(
    names: Mapping[torch.Tensor, list[str]], layer_decay: float | None, layers: Sequence[str] | None
) -> dict[torch.Tensor, tuple[int, float]] | None:
    """Return the layer of every parameter and the factor of its learning rate, or None if all layers are alike."""
    if layer_decay is None:
        if layers is not None:
            raise ParameterError("groups: layers are for layer_decay: give it as well, such as layer_decay=0.75")
        return None
    if isinstance(layer_decay, bool) or not isinstance(layer_decay, Real) or not 0.0 < float(layer_decay) <= 1.0:
        raise ParameterError(f"groups: layer_decay must be a number > 0 and <= 1, got {layer_decay!r}")
    first = [own[0] for own in names.values()]
    depths = layers_in_order(first, [p.dim() for p in names]) if layers is None else layers_by_patterns(layers, first)
    last = max(depths)
    return {p: (depth, float(layer_decay) ** (last - depth)) for p, depth in zip(names, depths, strict=True)}


def _split_by_layer(
    members: list[_Member], scales: Mapping[torch.Tensor, tuple[int, float]] | None
) -> list[tuple[int | None, float, list[_Member]]]:
    if scales is None:
        return [(None, 1.0, members)]
    found: dict[tuple[int, float], list[_Member]] = {}
    for member in members:
        found.setdefault(scales[member[1]], []).append(member)
    return [(layer, scale, found[layer, scale]) for layer, scale in sorted(found)]


def _split_by_decay(name: str, members: list[_Member], settings: Group, no_decay: str | None) -> list[Group]:
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


def _group(name: str, members: list[_Member], settings: Group) -> Group:
    group = {**_members(members), "name": name, **settings}
    mark_no_decay(group)
    return group


def _members(members: Iterable[_Member]) -> Group:
    found = list(members)
    tied = {own[0]: own[1:] for own, _ in found if len(own) > 1}
    return {
        "params": [p for _, p in found],
        "param_names": [own[0] for own, _ in found],
        **({TIED: tied} if tied else {}),
    }


def as_groups(model_or_params: Any) -> list[Group]:
    """Return group dicts, newly made, for a module, parameters, (name, parameter) pairs or group dicts.

    Raises ParameterError for anything else, an empty list, or a parameter in two groups.
    """
    if isinstance(model_or_params, torch.nn.Module):
        names = _names(model_or_params)
        if not names:
            raise ParameterError(f"{type(model_or_params).__name__} has no parameter that requires a gradient")
        return [_members((own, p) for p, own in names.items())]
    if isinstance(model_or_params, torch.Tensor):
        raise ParameterError("one tensor was given as the parameters: give a list, [tensor], or the module")
    if not isinstance(model_or_params, Iterable):
        name = getattr(model_or_params, "__name__", "")
        fix = f": call it, {name}()" if callable(model_or_params) and name else ""
        raise ParameterError(
            f"expected a module or an iterable of parameters, got {type(model_or_params).__name__}{fix}"
        )
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
    mark_no_decay(group)
    members = [group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"])
    if members and all(isinstance(member, tuple) for member in members):
        group["param_names"] = [name for name, _ in members]
        members = [p for _, p in members]
    group["params"] = members
    for member in members:
        if not isinstance(member, torch.Tensor):
            raise ParameterError(
                f"{where}: expected a tensor, got {type(member).__name__}; names go with all parameters or none"
            )
    return group


def _check_members(found: list[Group]) -> None:
    seen: dict[int, str] = {}
    for position, group in enumerate(found):
        name = str(group.get("name", position))
        for p in group["params"]:
            if id(p) in seen:
                raise ParameterError(
                    f"the same parameter, of shape {tuple(p.shape)}, is in group {seen[id(p)]} and in group {name}"
                )
        seen.update((id(p), name) for p in group["params"])
    if not seen:
        raise ParameterError("the parameter groups are all empty")
