"""What an update gives to the log by itself: the loss, and the values of learning rates and schedules."""

from typing import Any

import torch

from metaopt.engine.chain import ParamGroup
from metaopt.engine.run.run import Run
from metaopt.engine.update.update import Update
from metaopt.scheduled_values import points_of


def measure_loss(run: Run, loss: Any) -> None:
    real = isinstance(loss, int | float) or (hasattr(loss, "__float__") and not isinstance(loss, torch.Tensor))
    if real and not isinstance(loss, bool):
        loss = float(loss)
    elif not (isinstance(loss, torch.Tensor) and loss.numel() == 1 and not loss.is_complex()):
        loss = None
    if loss is not None:
        # at every update, as a loss that is recorded: a point is the mean of both kinds over the same updates
        run.metrics.record("train/loss", loss)


def measure(update: Update, loss: Any) -> None:
    run = update.run
    measure_loss(run, loss)
    if update.is_logged:
        for tag, group in zip(rate_tags(run.param_groups), run.param_groups, strict=True):
            if group.get("lr") is not None:
                run.metrics.measure(tag, group["lr"])
        if run.has_schedules:
            for tag, value in points_of(run.scheduled, run.param_groups, group_names(run.param_groups)).items():
                run.metrics.measure(tag, value)


def rate_tags(groups: list[ParamGroup]) -> list[str]:
    """Return the tag of every group's learning rate, in the groups' order."""
    return [f"train/learning_rate/{name}" if name else "train/learning_rate" for name in group_names(groups)]


def group_names(groups: list[ParamGroup]) -> list[str]:
    """Return what tags call the groups: nothing if there is one; groups of one name get their positions."""
    if len(groups) == 1:
        return [""]
    names = [str(group.get("name", position)) for position, group in enumerate(groups)]
    named = [name if names.count(name) == 1 else f"{name} {position}" for position, name in enumerate(names)]
    # "group": the rate of a group called "decay" must not read as a decay of the rate
    return [f"group {name}" for name in named]
