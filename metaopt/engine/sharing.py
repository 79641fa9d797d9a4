"""Whether a stack is given a rank's share of the parameters alone."""

import sys
from types import FrameType


def made_for_a_share() -> bool:
    """Tell whether ZeroRedundancyOptimizer is making a stack right now, over the parameters that one rank updates.

    Nothing in such parameters says so: they are whole tensors, fewer than the model has.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return False
    maker = module.ZeroRedundancyOptimizer._init_local_optimizer.__code__
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not maker:
        frame = frame.f_back
    return frame is not None
