"""Copies of the weights that FSDP2 gathers for a forward pass, and may keep."""

import sys
from collections.abc import Iterable

import torch


def drop_gathered_copies(params: Iterable[torch.Tensor]) -> None:
    """Have FSDP2 gather the weights anew for the next forward pass, where any of `params` is a DTensor.

    After an evaluation without a backward pass a root module keeps what it gathered: weights that were exchanged
    since would be neither evaluated nor trained.
    """
    tensor = sys.modules.get("torch.distributed.tensor")
    fsdp = sys.modules.get("torch.distributed.fsdp")
    # no parameter leads to its module; torch keeps the modules that it shards here
    states = sys.modules.get("torch.distributed._composable_state")
    if tensor is None or fsdp is None or states is None:
        return
    if any(isinstance(p, tensor.DTensor) for p in params):
        for module in list(states._module_state_mapping):
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()
