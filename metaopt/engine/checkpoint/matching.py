"""Which parameter of a checkpoint is which of the stack: by name, or by position; reads both."""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from metaopt.engine.chain import ParamGroup
from metaopt.errors import CheckpointError

# what DDP, torch.compile, FSDP, activation checkpointing and peft put into the names of a model's parameters
AROUND = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"})


@dataclass
class Matched:
    """A checkpoint beside the groups of a stack.

    `ids` has a list for each live group: the checkpoint's id of each parameter, or a new one for parameters that it
    does not have. `sources` has, for each live group, the positions of the saved groups that its parameters come from.
    `groups` are the saved groups as they are, `state` holds only what belongs to parameters of this stack.
    """

    groups: list[ParamGroup]
    state: dict[Any, Any]
    ids: list[list[Any]]
    sources: list[list[int]]
    by: Literal["names", "positions"]
    new: list[str]
    gone: list[str]

    def is_same_group(self, position: int) -> bool:
        """Return whether a live group's parameters come from one saved group, and no other group's do."""
        own = self.sources[position]
        return len(own) == 1 and sum(own[0] in others for others in self.sources) == 1

    @property
    def is_same_order(self) -> bool:
        """Whether both sides have the same parameters, in the same groups and the same order."""
        return self.ids == [list(group["params"]) for group in self.groups]


def matched(live_groups: list[ParamGroup], state_dict: Mapping[str, Any], names: Sequence[str] | None) -> Matched:
    """Return which saved parameter is which live one. Raises CheckpointError if that cannot be known."""
    # lists of thousands of numbers or names are copied at once
    lists: list[dict[str, list[Any]]] = [
        {key: list(group[key]) for key in ("params", "param_names") if isinstance(group.get(key), list)}
        for group in state_dict["param_groups"]
    ]
    memo: dict[int, Any] = {}  # what groups share stays shared
    groups = [
        {**copy.deepcopy({k: v for k, v in group.items() if k not in own}, memo), **own}
        for group, own in zip(state_dict["param_groups"], lists, strict=True)
    ]
    state = state_dict["state"]
    saved, live = _saved_names(groups, names), _live_names(live_groups)
    if names is not None and live is None:
        raise CheckpointError(
            "names= was given, but the parameters of this stack have no names to find them by: "
            "build the stack over the model or model.named_parameters()"
        )
    if saved is None or live is None:
        return _by_position(live_groups, groups, state, saved, live)
    every, every_saved = [n for part in live for n in part], [n for part in saved for n in part]
    partners = _partners(every, every_saved)
    if not partners:
        raise CheckpointError(
            f"no parameter of the checkpoint ({every_saved[0]}, ...) has a name of this stack's ({every[0]}, ...): it "
            f"belongs to another model; if the parameters were only renamed, load_state_dict(..., names=[...]) gives "
            f"the checkpoint's new names in its order"
        )
    place = {
        name: (position, i)
        for position, part in enumerate(saved)
        for name, i in zip(part, groups[position]["params"], strict=True)
    }
    number = _first_free(i for group in groups for i in group["params"])
    ids: list[list[Any]] = []
    sources: list[list[int]] = []
    new: list[str] = []
    for part in live:
        ids.append([])
        found = set()
        for name in part:
            if name in partners:
                position, i = place[partners[name]]
                found.add(position)
                ids[-1].append(i)
            else:
                ids[-1].append(number + len(new))
                new.append(name)
        sources.append(sorted(found))
    used = set(partners.values())
    gone = [name for name in every_saved if name not in used]
    return Matched(groups, _belonging(state, groups, ids), ids, sources, "names", new, gone)


def _by_position(live_groups: list[ParamGroup], groups: list[ParamGroup], state: Any, saved: Any, live: Any) -> Matched:
    sizes, own = [[len(g["params"]) for g in side] for side in (groups, live_groups)]
    if sizes != own:
        lacking = "this stack has none" if live is None else "the checkpoint has none"
        raise CheckpointError(
            f"the checkpoint has groups of {sizes} parameters, this stack of {own}: build the stack over the same "
            f"model and groups. Other groups, or other parameters, can be matched only by names, and {lacking}: build "
            f"over model.named_parameters(), and load_state_dict(..., names=[...]) gives the names of the checkpoint's "
            f"parameters in its order"
        )
    ids = [list(group["params"]) for group in groups]
    sources = [[position] for position in range(len(groups))]
    return Matched(groups, dict(state), ids, sources, "positions", [], [])


def _saved_names(groups: list[ParamGroup], given: Sequence[str] | None) -> list[list[str]] | None:
    """Return the names of the saved parameters, group by group, or None if they have none or not one each."""
    sizes = [len(group["params"]) for group in groups]
    if given is not None:
        if len(given) != sum(sizes) or len(set(given)) != len(given):
            raise CheckpointError(
                f"names= has {len(given)} names, {len(set(given))} of them different, and the checkpoint "
                f"{sum(sizes)} parameters: give one name for each, in the order in which its optimizer was built"
            )
        rest = iter(given)
        return [[next(rest) for _ in range(size)] for size in sizes]
    if all(isinstance(i, str) for group in groups for i in group["params"]):
        found = [list(group["params"]) for group in groups]  # a distributed checkpoint has names in place of numbers
    else:
        found = [list(group.get("param_names") or ()) for group in groups]
    return found if _are_complete(found, sizes) else None


def _live_names(groups: list[ParamGroup]) -> list[list[str]] | None:
    found = [list(group.get("param_names") or ()) for group in groups]
    return found if _are_complete(found, [len(group["params"]) for group in groups]) else None


def _are_complete(found: list[list[str]], sizes: list[int]) -> bool:
    every = [name for part in found for name in part]
    return [len(part) for part in found] == sizes and 0 < len(every) == len(set(every))


def _partners(live: list[str], saved: list[str]) -> dict[str, str]:
    """Return, by live name, the saved name of the same parameter."""
    partners = {name: name for name in live if name in set(saved)}
    missing = [name for name in live if name not in partners]
    left = [name for name in saved if name not in partners]
    partners.update(_equal_when({n: _plain(n) for n in missing}, {n: _plain(n) for n in left}))
    return partners or _equal_when(*_without_prefix(live, saved))


def _equal_when(live: dict[str, str], saved: dict[str, str]) -> dict[str, str]:
    """Return the pairs whose other form is the same, if it is nobody else's."""
    often, often_saved = Counter(live.values()), Counter(saved.values())
    back = {form: name for name, form in saved.items() if often_saved[form] == 1}
    return {name: back[form] for name, form in live.items() if form in back and often[form] == 1}


def _plain(name: str) -> str:
    return ".".join(word for word in name.split(".") if word not in AROUND)


def _without_prefix(live: list[str], saved: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return both sides' names without a prefix that all names of one side have: the model has become a submodule."""
    best: tuple[int, dict[str, str], dict[str, str]] = 0, {}, {}
    for longer, shorter in ((live, saved), (saved, live)):
        short = set(shorter)
        words = longer[0].split(".")
        for end in range(1, len(words)):
            prefix = ".".join(words[:end]) + "."
            if not all(name.startswith(prefix) for name in longer):
                break
            cut = {name: name.removeprefix(prefix) for name in longer}
            agree = len(short & set(cut.values()))
            if agree > best[0]:
                whole = {name: name for name in shorter}
                best = (agree, cut, whole) if longer is live else (agree, whole, cut)
    return best[1], best[2]


def _first_free(ids: Any) -> int:
    return max((i for i in ids if isinstance(i, int)), default=-1) + 1


def _belonging(state: Mapping[Any, Any], groups: list[ParamGroup], ids: list[list[Any]]) -> dict[Any, Any]:
    """Return the state of parameters of this stack, and what a base keeps beside the parameters'."""
    saved = {i for group in groups for i in group["params"]}
    used = {i for part in ids for i in part}
    return {key: value for key, value in state.items() if key in used or key not in saved}
