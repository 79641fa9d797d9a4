"""A reset that a wrapper asks for: the base's state of some parameters is deleted, or set to zeros.

The next update of these parameters is a first one (`first_update`): the base itself makes new state in its step. What
begins with zeros is not deleted but cleared.
"""

from collections.abc import Sequence

import torch

from metaopt.distributed.shards import local
from metaopt.engine.chain import PLACEHOLDER, Chain
from metaopt.engine.run.run import Run


def forget_base_state(run: Run, params: Sequence[torch.Tensor], chain: Chain) -> None:
    """Drop the base's state of some parameters, its count included: its next update of them is like a first one.

    torch's Adam and AdamW begin with zeros. Theirs stay and are cleared, a call for all tensors of one key.
    """
    if chain.begins_at_zero and not run.is_differentiable:
        kept: dict[object, list[torch.Tensor]] = {}
        for p in params:
            param_state = run.state[p]
            if not param_state.get(PLACEHOLDER):
                for key, value in param_state.items():
                    if chain.is_base_key(key):
                        kept.setdefault((key, p.device, value.dtype), []).append(local(value))
        for tensors in kept.values():
            torch._foreach_zero_(tensors)
        return
    for p in params:
        param_state = run.state[p]
        for key in [key for key in param_state if chain.is_base_key(key)]:
            del param_state[key]
    accelerators = run.accelerators  # no parameter has moved to another one
    run.invalidate()
    run.accelerators = accelerators
