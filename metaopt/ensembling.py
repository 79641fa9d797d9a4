"""Snapshot ensembles: the weights at the end of every cycle of the learning rate, and the mean of their predictions."""

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from metaopt.checkpoint_file import read_saved
from metaopt.distributed.shards import is_sharded
from metaopt.errors import CheckpointError, ParameterError
from metaopt.metrics import rank
from metaopt.stack import Stack

FILES = "snapshot-*.pt"


def save_snapshots(
    opt: Stack, model: torch.nn.Module, directory: str | os.PathLike[str], *, every: int | None = None
) -> RemovableHandle:
    """Save the model's state dict at the end of every cycle of the learning rate, and at the end of the run.

    A cycle ends where the rate rises again: `cosine_restarts`, `cyclic`, `sequence` and any other schedule. With
    `every`, that many updates are a cycle, whatever the rate does. Each file, `snapshot-00002000.pt`, is the model's
    `state_dict()` after that many updates; a resumed run writes the same files. arXiv:1704.00109

    Returns a handle whose `remove()` ends the saving. Raises ParameterError.

        metaopt.save_snapshots(opt, model, "snapshots")
        train(model, opt)
        predict = metaopt.ensemble(model, "snapshots", output=torch.nn.Softmax(dim=-1))
    """
    if not isinstance(opt, Stack) or not isinstance(model, torch.nn.Module):
        raise ParameterError(
            f"save_snapshots() takes a stack and a model, got {type(opt).__name__} and {type(model).__name__}"
        )
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ParameterError(f"save_snapshots(): every must be a number of updates from 1 up, got {every!r}")
    if every is None and "lr" not in opt.schedules_of(opt.param_groups[0]):
        raise ParameterError(
            "save_snapshots(): the learning rate has no schedule with cycles: give every=, a number of updates"
        )
    return opt.register_step_post_hook(_Saving(model, Path(directory), every, opt.updates))


class _Saving:
    """What is called after every step of the stack."""

    def __init__(self, model: torch.nn.Module, directory: Path, every: int | None, updates: int) -> None:
        self.model, self.directory, self.every = model, directory, every
        self.seen = updates

    def __call__(self, opt: Any, args: Any, kwargs: Any) -> None:
        updates = opt.updates
        if updates == self.seen:
            return  # the update was skipped
        if updates == 1 and any(self.directory.glob(FILES)):
            raise ParameterError(
                f"save_snapshots(): {self.directory} holds the snapshots of an earlier run: choose another directory, "
                f"or delete them"
            )
        self.seen = updates
        if updates % self.every == 0 if self.every is not None else ends_cycle(opt, updates):
            _save(self.model, self.directory / f"snapshot-{updates:08d}.pt")


def ends_cycle(opt: Stack, updates: int) -> bool:
    """Return whether a cycle of the learning rate, or the run, is over after so many updates."""
    if updates == opt.total_steps:
        return True
    schedule = opt.schedules_of(opt.param_groups[0]).get("lr")
    if schedule is None or updates < 2:
        return False
    curve = schedule.curve(opt.total_steps, opt.total_steps)
    before, last, coming = (float(curve(t)) for t in (updates - 2, updates - 1, updates))
    return before >= last < coming


def _save(model: torch.nn.Module, path: Path) -> None:
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model = model.module
    # all ranks take part in gathering shards
    state = {k: v.full_tensor() if _is_shard(v) else v for k, v in model.state_dict().items()}
    if rank() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # a program that dies while it writes leaves no half of a file under this name
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def _is_shard(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and is_sharded(value)


class Ensemble(torch.nn.Module):
    """Several models as one: the mean of what they return."""

    def __init__(self, members: Sequence[torch.nn.Module], output: Callable[[Any], torch.Tensor] | None = None) -> None:
        super().__init__()
        self.members = torch.nn.ModuleList(members)
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the mean over the members of `output(member(...))`."""
        total: torch.Tensor | None = None
        for member in self.members:
            returned = member(*args, **kwargs)
            value = returned if self.output is None else self.output(returned)
            if not isinstance(value, torch.Tensor):
                raise ParameterError(
                    f"an ensemble averages tensors, and the model returns {type(value).__name__}: say what to average, "
                    f"such as ensemble(..., output=lambda returned: returned.logits.softmax(-1))"
                )
            total = value if total is None else total + value
        assert total is not None
        return total / len(self.members)


def ensemble(
    model: torch.nn.Module,
    snapshots: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    last: int | None = None,
    output: Callable[[Any], torch.Tensor] | None = None,
) -> Ensemble:
    """Return a module that averages the predictions of several snapshots of a model.

    `snapshots` is the directory that `save_snapshots` has written, or a list of files that hold state dicts. `last`
    takes only the latest so many. `output` makes of what a model returns what is averaged: probabilities for a
    classifier, `torch.nn.Softmax(dim=-1)`, as in arXiv:1704.00109. The members are copies of the model, in `eval()`.
    Raises ParameterError, CheckpointError.
    """
    if isinstance(snapshots, str | os.PathLike):
        files = sorted(Path(snapshots).glob(FILES))
    else:
        files = [Path(file) for file in snapshots]
    if last is not None and (isinstance(last, bool) or not isinstance(last, int) or last < 1):
        raise ParameterError(f"ensemble(): last must be a number of snapshots from 1 up, got {last!r}")
    if not files:
        raise ParameterError(
            f"ensemble(): {snapshots} holds no snapshots ({FILES}): metaopt.save_snapshots writes them"
        )
    members = []
    for file in files if last is None else files[-last:]:
        member = copy.deepcopy(model)
        state = read_saved(file)
        try:
            member.load_state_dict(state)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} is not a snapshot of this model: {error}") from None
        members.append(member.eval().requires_grad_(False))
    return Ensemble(members, output)
