"""What a base keeps of a parameter, learned by letting it make one update of a stand-in."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from metaopt.engine.lanes import Entry, Lane

if TYPE_CHECKING:
    from metaopt.stack import Stack


def state_after_one_update(lane: Lane, entry: Entry, like: torch.Tensor) -> dict[Any, Any]:
    """Return the state that the lane's base makes for a parameter like this one in this group: {} if it cannot tell."""
    kind = type(lane.base)
    names = inspect.signature(kind).parameters
    given = {k: v for k, v in {**lane.base.defaults, **entry}.items() if k in names and k != "params"}
    try:
        with torch.enable_grad():
            parameter = torch.zeros_like(like).requires_grad_()
            base = kind([parameter], **given)
            parameter.grad = torch.ones_like(parameter)
            # what the base draws is nobody else's loss
            with torch.random.fork_rng(devices=[like.device] if like.is_cuda else []):
                base.step(lambda: 0.0) if lane.needs_closure else base.step()
    except Exception:  # a base from elsewhere may want more than one parameter with one gradient
        return {}
    return dict(base.state.get(parameter, {}))


def restore_dtypes(stack: "Stack", groups: list[Entry], saved: Mapping[Any, Any]) -> None:
    """Put back unrounded what torch cast to the parameter's dtype although the base keeps it in another.

    Otherwise float32 moments of a bfloat16 parameter come back rounded, and a float32 product of a float64 one counts
    on with other digits.
    """
    known: dict[Any, dict[Any, Any]] = {}
    for group, entry in zip(groups, stack.param_groups, strict=True):
        for i, p in zip(group["params"], entry["params"], strict=True):
            before, loaded = saved.get(i), stack.state.get(p)
            if not (isinstance(before, dict) and isinstance(loaded, dict) and _was_cast(before, loaded)):
                continue
            kind = id(entry), p.dtype, p.device, p.dim()
            if kind not in known:
                # dtypes do not depend on the size: a small stand-in will do
                small = torch.zeros([2] * p.dim(), dtype=p.dtype, device=p.device)
                known[kind] = state_after_one_update(stack.lane_of(entry), entry, small)
            loaded.update(_unrounded(before, loaded, known[kind]))


def _unrounded(saved: Any, loaded: Any, kept: Any) -> Any:
    """Return what was loaded with the saved tensors in place of cast ones, where the base keeps them so by itself."""
    if isinstance(saved, torch.Tensor) and isinstance(loaded, torch.Tensor) and isinstance(kept, torch.Tensor):
        wanted = saved.dtype != loaded.dtype and saved.dtype == kept.dtype
        return saved.detach().to(device=loaded.device, copy=True) if wanted else loaded
    if isinstance(saved, dict) and isinstance(loaded, dict) and isinstance(kept, dict):
        return {k: _unrounded(saved.get(k), v, kept.get(k)) for k, v in loaded.items()}
    lists = all(isinstance(value, list | tuple) for value in (saved, loaded, kept))
    if lists and len(saved) == len(loaded) == len(kept):
        return type(loaded)(_unrounded(*values) for values in zip(saved, loaded, kept, strict=True))
    return loaded


def _was_cast(saved: Any, loaded: Any) -> bool:
    """Tell whether a tensor in what was loaded has another dtype than the saved one."""
    if isinstance(saved, torch.Tensor) and isinstance(loaded, torch.Tensor):
        return saved.dtype != loaded.dtype
    if isinstance(saved, dict) and isinstance(loaded, dict):
        return any(_was_cast(saved.get(key), value) for key, value in loaded.items())
    if isinstance(saved, list | tuple) and isinstance(loaded, list | tuple) and len(saved) == len(loaded):
        return any(_was_cast(*pair) for pair in zip(saved, loaded, strict=True))
    return False
