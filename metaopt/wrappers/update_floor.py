"""Updates that are never too small beside the weights."""

import torch
from torch import Tensor

from metaopt import Example, Group, Wrapper, elementwise, hookimpl, hyper


def _lengthen(update: Tensor, param: Tensor, *, floor: float, lr: float) -> dict[str, Tensor]:
    return {"update": update * _factor(torch.norm(update), torch.norm(param) * (floor * lr))}


class UpdateFloor(Wrapper):
    """u <- u max(1, floor lr |w| / |u|) for each tensor: an update at rate 1 moves the weights by `floor` |w| or more.

    The u/w floor of modded-nanogpt's track 3, there after Muon and without weight decay: of each tensor since pull
    request 274 (floor=0.35, later 0.3825), of each row since 328. An update of zero stays zero.
    """

    known_as = ("u/w floor", "u/w-floor", "RowFloor", "TARGET_UW")

    floor: float = hyper(0.35, ge=0.0, doc="the smallest |u| / |w| of an update at rate 1", known_as=("target_uw",))
    rows: bool = hyper(False, doc="hold it for each index of the first dimension; a vector is one row")

    lengthen = elementwise(_lengthen)

    def on_update(self, group: Group) -> None:
        share = group.floor * group.base_lr
        if group.rows:
            updates = group.rows_of(group.update)
            updates.multiply(_factor(updates.norms(), group.rows_of(group.params).norms() * share))
        else:
            lengths, sizes = (group.stack(group.norms(each)) for each in (group.update, group.params))
            group.multiply(group.update, _factor(lengths, sizes * share))

    def update_rules(self, group: Group) -> None:
        if group.rows:
            self.on_update(group)
        else:
            self.lengthen(group)


def _factor(lengths: torch.Tensor, floors: torch.Tensor) -> torch.Tensor:
    return torch.where((lengths > 0) & (lengths < floors), floors / lengths, 1.0)


@hookimpl
def metaopt_wrappers() -> dict[str, type[Wrapper]]:
    return {"update_floor": UpdateFloor}


@hookimpl
def metaopt_examples() -> dict[str, list[Example]]:
    return {"update_floor": [Example("update_floor"), Example("update_floor(0.38, rows=True)")]}
