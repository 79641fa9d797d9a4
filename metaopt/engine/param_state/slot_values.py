"""The first value of a slot: its dtype, its device, and zeros, a number or a copy of the weights. Changes no state.

The moments of a base, beside which a wrapper keeps its own, are added to a state that is given.
"""

from typing import Any

import torch

from metaopt.engine.chain import Chain, ParamState, is_moment
from metaopt.errors import StepError
from metaopt.multi_tensor import at_least_float32
from metaopt.slots import Slot


def slot_dtype(slot: Slot, values: dict[str, Any], parameter: torch.Tensor) -> torch.dtype:
    """Return the dtype of a slot: the parameter's own, a named one, or the one that a hyperparameter names."""
    named = values.get(slot.dtype, slot.dtype) if slot.dtype is not None else None
    if named is None:
        return parameter.dtype
    if named == "at least float32":
        wide = at_least_float32(parameter.dtype)
        return wide.to_real() if slot.kind == "scalar" else wide
    dtype: torch.dtype = getattr(torch, named)
    return dtype


def slot_device(slot: Slot, values: dict[str, Any], parameter: torch.Tensor) -> torch.device:
    """Return the device of a slot: the parameter's own, a named one, or the one that a hyperparameter names."""
    named = values.get(slot.device, slot.device) if slot.device is not None else None
    return parameter.device if named is None else torch.device(named)


def copy_for_slot(value: torch.Tensor, slot: Slot, values: dict[str, Any], parameter: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor in the dtype and on the device of its slot; pinned if it leaves an accelerator."""
    dtype, device = slot_dtype(slot, values, parameter), slot_device(slot, values, parameter)
    if device.type == "cpu" and parameter.device.type != "cpu":
        pinned = torch.empty_like(value, dtype=dtype, device=device, pin_memory=True)
        return pinned.copy_(value.detach())
    return value.detach().to(device=device, dtype=dtype, copy=True)


def first_value(slot: Slot, values: dict[str, Any], p: torch.Tensor) -> torch.Tensor:
    """Return what a slot of a parameter begins with: a number, zeros, or a copy of the weights."""
    if slot.kind == "scalar":
        return torch.full((), slot.initial, dtype=slot_dtype(slot, values, p), device=p.device)
    if slot.kind == "zeros":
        zeros = torch.zeros_like(p, dtype=slot_dtype(slot, values, p), requires_grad=False)
        return zeros if slot.device is None else copy_for_slot(zeros, slot, values, p)
    return copy_for_slot(p, slot, values, p)


def missing_values(chain: Chain, p: torch.Tensor, param_state: ParamState) -> ParamState:
    """Return the initial value of every slot that a parameter's state lacks."""
    return {
        keyed.key: first_value(keyed.slot, vars(keyed.wrapper), p)
        for keyed in chain.slots
        if keyed.key not in param_state
    }


def add_zero_moments(chain: Chain, p: torch.Tensor, param_state: ParamState, key: str) -> None:
    """Begin a wrapper's copy of each of the base's moments with zeros."""
    for base_key, value in [(k, v) for k, v in param_state.items() if chain.is_base_key(k)]:
        if isinstance(value, list | dict):
            raise StepError(
                f"{key.split('.')[0]} cannot act on the moments of {type(chain.base).__name__}: "
                f"its state holds lists or dicts ({base_key}); use pullback_momentum='none'"
            )
        if is_moment(value, base_key, p):
            param_state.setdefault(f"{key}.{base_key}", torch.zeros_like(value))
