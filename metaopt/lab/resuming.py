"""Continue a run from a checkpoint: on the same number of ranks bit for bit, on another one with the same weights."""

import warnings
from pathlib import Path
from typing import Any

import torch

from metaopt.errors import CheckpointError, MetaoptWarning
from metaopt.lab import checkpoint
from metaopt.lab.device import random_state, set_random_state
from metaopt.lab.ranks import Ranks
from metaopt.stack import Stack

_WAYS = {"spec": "; --keep live takes the new one, --keep saved the old values", "steps": "; --extend allows it"}


def content_of(run: dict[str, Any], step: int, model: torch.nn.Module, opt: Stack, device: str) -> dict[str, Any]:
    """Return what a checkpoint holds: everything that matters to the next step."""
    random = {"cpu": torch.get_rng_state()}
    own = random_state(device)
    if own is not None:
        random[torch.device(device).type] = own
    return {"run": run, "step": step, "model": model.state_dict(), "stack": opt.state_dict(), "random": random}


def resume(
    chosen: bool | Path,
    folder: Path | None,
    run: dict[str, Any],
    changeable: set[str],
    model: torch.nn.Module,
    opt: Stack,
    ranks: Ranks,
    has_replicas: bool = False,
) -> int:
    """Load the newest checkpoint, or the one chosen; return how many steps it has made. Raises CheckpointError.

    `changeable` are the entries of `run` that may be others than those of the checkpoint. Of replicas each goes on with
    its own part; one that the run did not have takes the outer weights of the others when it joins them.
    """
    if folder is None:
        raise CheckpointError("--resume needs --log: the directory of the run that is continued")
    first = [chosen] if isinstance(chosen, Path) else checkpoint.found(folder)[:1]
    paths = ranks.from_first(first)
    if not paths:
        return 0  # killed before its first checkpoint: the run starts again, and ends the same
    (path,) = paths
    if not all(ranks.gathered(checkpoint.is_whole(path, ranks.rank, ranks.size))):
        raise checkpoint.damaged(path)
    live = _Live(model)
    content = checkpoint.load(path, live.like, ranks.rank if has_replicas else 0)
    _check_same_run(path, content, run, changeable)
    step = int(content["step"])
    if step > run["steps"]:
        raise CheckpointError(f"{path} has made {step} steps already: give --steps {step} or more")
    if has_replicas and ranks.rank >= content.get(checkpoint.REPLICAS, ranks.size):
        return step
    model.load_state_dict(live.placed("model", content["model"]))
    entries = content["stack"]["state"].items()
    state = {number: live.placed(f"stack.{number}", values, content) for number, values in entries}
    with warnings.catch_warnings():
        if changeable:  # the load report says it, in a line of the command
            warnings.simplefilter("ignore", MetaoptWarning)
        opt.load_state_dict({**content["stack"], "state": state})
    # a rank that the run did not have gets the numbers of the first
    random = content["random"][ranks.rank if ranks.rank < len(content["random"]) else 0]
    torch.set_rng_state(random["cpu"])
    if torch.device(ranks.device).type != "cpu":
        set_random_state(ranks.device, random.get(torch.device(ranks.device).type))
    return step


def _check_same_run(path: Path, content: dict[str, Any], run: dict[str, Any], changeable: set[str]) -> None:
    for key, value in run.items():
        if (there := content["run"].get(key)) != value and key not in changeable:
            raise CheckpointError(
                f"{path} is of another run: {key} is {there!r} there, {value!r} here{_WAYS.get(key, '')}"
            )


class _Live:
    """The tensors of a model that is to be continued: where each tensor of a checkpoint goes, and in which shards."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}

    def like(self, key: str, rest: dict[str, Any]) -> torch.Tensor | None:
        """Return the live tensor whose shards a checkpoint's tensor has; None if it is whole on each rank."""
        kind, _, name = key.partition(".")
        if kind == "stack":
            name = _names(rest["stack"]).get(int(name.partition(".")[0]), "")
        live = self._model.get(name)
        return live.detach() if live is not None and _is_sharded(live) else None

    def placed(self, where: str, values: dict[str, Any], rest: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return values with whole tensors in the shards of the live ones: of a checkpoint that has no shards."""
        return {name: self._placed(f"{where}.{name}", value, rest or {}) for name, value in values.items()}

    def _placed(self, key: str, value: Any, rest: dict[str, Any]) -> Any:
        if not isinstance(value, torch.Tensor) or _is_sharded(value):
            return value
        like: Any = self.like(key, rest)
        if like is None or like.shape != value.shape:
            return value
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def _names(stack: dict[str, Any]) -> dict[int, str]:
    """Return the name of each parameter by its number in a stack's state dict."""
    found: dict[int, str] = {}
    for group in stack["param_groups"]:
        found.update(zip(group["params"], group.get("param_names", ()), strict=False))
    return found


def _is_sharded(tensor: torch.Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
