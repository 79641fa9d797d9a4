"""How the parameters of a group are dealt out to views: by device and dtype, and further into blocks for a cache."""

from typing import Any

import torch

from metaopt.engine.chain import ParamGroup
from metaopt.engine.update.change import Params
from metaopt.engine.update.update import Update
from metaopt.engine.views.group_view import GroupView, base_keys
from metaopt.wrapper import Wrapper


def views_of(
    update: Update, group: ParamGroup, wrapper: Wrapper, parameters: Params, updates: int | None = None
) -> list[GroupView]:
    """Split parameters by device, dtype and the moments that the base keeps of them; no view is empty."""
    if not parameters:
        return []
    chain = update.run.structure.chain_of(group)
    by_moments = chain.slots_of(wrapper).keeps_moments or wrapper.observes
    if not by_moments and update.are_uniform(group, parameters):
        return [GroupView(update, group, wrapper, parameters, updates=updates)]
    kinds: list[Any] = [(p.dtype, p.device) for p in parameters]
    if by_moments:
        moments = [tuple(base_keys(chain, update.run.state.get(p) or {})) for p in parameters]
        kinds = list(zip(kinds, moments, strict=True))
    if len(set(kinds)) == 1:
        return [GroupView(update, group, wrapper, parameters, updates=updates)]
    buckets: dict[Any, list[torch.Tensor]] = {}
    for kind, p in zip(kinds, parameters, strict=True):
        buckets.setdefault(kind, []).append(p)
    return [GroupView(update, group, wrapper, bucket, updates=updates) for bucket in buckets.values()]


def block_views_of(
    update: Update, group: ParamGroup, wrapper: Wrapper, parameters: Params, updates: int | None = None
) -> list[GroupView]:
    """Split parameters as `views_of` does; for an elementwise wrapper, further into blocks.

    They fit into a processor's cache. Those of an accelerator are large: few launches, and bounded temporary memory.
    """
    views = views_of(update, group, wrapper, parameters, updates)
    if not wrapper.elementwise or update.run.structure.chain_of(group).slots_of(wrapper).keeps_moments:
        return views
    return [block for view in views for block in view.blocks()]
