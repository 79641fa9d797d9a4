"""Parameters whose base begins anew: nothing of the base's is kept of them, but a checkpoint holds them whole (law 1).

A wrapper, or `reset_state`, may drop the base's entries of a parameter, which then start lazily. A distributed
checkpoint wants to find the same keys for every parameter, so what the base would make is filled in before a state
dict is taken, and `state[p]["metaopt.anew"]` says 1: at the next update it is dropped again.
"""

from typing import TYPE_CHECKING, Any

import torch

from metaopt.engine.lanes import ANEW, Lane

if TYPE_CHECKING:
    from metaopt.stack import Stack

Entry = dict[str, Any]


def of_wrappers(lane: Lane, held: dict[str, Any]) -> dict[str, Any]:
    """Return what counts of a parameter's entries: without the base's where the base begins anew."""
    if not held.get(ANEW):
        return held
    return {**{key: value for key, value in held.items() if not lane.is_base_key(key)}, ANEW: 0.0}


def fill_in(stack: "Stack") -> None:
    """Give every parameter whose base begins anew the entries that the base would make for it."""
    for entry in stack.param_groups:
        lane = stack.lane_of(entry)
        for p in entry["params"]:
            held = stack.state.get(p)
            if held and (lane.resets or held.get(ANEW)) and not any(lane.is_base_key(key) for key in held):
                held.update({**stepped_once(lane, entry, p)[0], ANEW: 1.0})
                stack.look_again()


def counts_in_groups(lane: Lane, entry: Entry) -> list[str]:
    """Return the entries of its groups in which a base counts: what is dropped for a parameter leaves them as they are.

    Found by one step over zeros.
    """
    params = [p for p in entry["params"] if p.requires_grad]
    return stepped_once(lane, entry, min(params, key=torch.numel))[1] if params else []


def stepped_once(lane: Lane, entry: Entry, p: torch.Tensor) -> tuple[dict[str, Any], list[str]]:
    """Step another optimizer of the base's class over zeros like `p`; return its state, and the numbers it counted."""
    with torch.enable_grad():
        zeros = torch.zeros_like(p).requires_grad_()
        zeros.grad = torch.zeros_like(zeros)
        scratch = type(lane.base)([zeros], **{k: entry[k] for k in lane.constructor_names if k in entry})
    other = Lane(scratch)
    other.call_mode("train")
    group = scratch.param_groups[0]
    before = {key: _number(value) for key, value in group.items()}
    with torch.no_grad():
        other.step()
    counted = [key for key, value in group.items() if _number(value) != before.get(key) and key not in ("lr", "params")]
    return dict(scratch.state.get(zeros, {})), counted


def _number(value: Any) -> float | None:
    if isinstance(value, torch.Tensor):
        return float(value) if value.numel() == 1 else None
    return float(value) if isinstance(value, int | float) else None
