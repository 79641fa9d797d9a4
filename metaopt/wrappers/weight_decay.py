"""Weight decay, coupled with the gradient or apart from it, around any base. arXiv:1711.05101"""

import torch

from metaopt import Group, Groups, Wrapper, hookimpl, hyper


class L2(Wrapper):
    """g <- g + weight_decay w: the penalty goes through the base like the loss, so an adaptive base rescales it.

    Adam with it is not AdamW: arXiv:1711.05101.
    """

    known_as = ("add_decayed_weights", "coupled weight decay", "weight_decay of SGD and Adam")

    weight_decay: float = hyper(ge=0.0, doc="the strength of the penalty weight_decay |w|^2 / 2")

    def on_gradients(self, groups: Groups) -> None:
        for group in groups:
            # a base that maximizes turns the gradient round, and the penalty must still point to zero
            strength = -group.weight_decay if group.maximize else group.weight_decay
            torch._foreach_add_(group.grads, group.params, alpha=strength)


class Decay(Wrapper):
    """w <- (1 - lr weight_decay) w right before the base's update, with the base's rate: AdamW's. arXiv:1711.05101"""

    known_as = ("decoupled weight decay", "weight_decay of AdamW", "decoupled_weight_decay")

    weight_decay: float = hyper(ge=0.0, doc="the share of the weights that an update at rate 1 takes away")

    def before_update(self, group: Group) -> None:
        torch._foreach_mul_(group.params, 1 - group.base_lr * group.weight_decay)


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"l2": L2, "decay": Decay}
