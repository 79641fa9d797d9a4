"""A reset that a wrapper asks for: the base's state of some parameters is deleted.

The next update of these parameters is a first one (`first_update`): the base itself makes new state in its step.
"""

from collections.abc import Sequence

import torch

from metaopt.engine.chain import Chain
from metaopt.engine.run.run import Run


def forget_base_state(run: Run, params: Sequence[torch.Tensor], chain: Chain) -> None:
    """Drop the base's state of some parameters, its count included: its next update of them is like a first one."""
    for p in params:
        param_state = run.state[p]
        for key in [key for key in param_state if chain.is_base_key(key)]:
            del param_state[key]
    accelerators = run.accelerators  # no parameter has moved to another one
    run.invalidate()
    run.accelerators = accelerators
