"""Several processes that train together, as torchrun starts them: each is a fork of a warm one."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import warm

from metaopt.cli import main
from metaopt.lab.ranks import joined, this_rank
from metaopt.lab.training import train
from metaopt.registry import registry

PATIENCE = 240


class Together:
    """The ranks of one run; each calls a function with its arguments."""

    def __init__(self, size: int, function: Callable[..., Any], *arguments: Any, restarts: int = 0) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = warm.context()
        self.pipes = [context.Pipe(duplex=False) for _ in range(size)]
        self.processes = []
        for rank, (_, writing) in enumerate(self.pipes):
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
            env |= {"MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": restarts}
            process = context.Process(target=_be_rank, args=(env, writing, function, arguments))
            process.start()
            self.processes.append(process)
            writing.close()

    def end(self) -> list[Any]:
        """Wait for the end of all; return what each returned, or None for one that returned nothing."""
        found = []
        for process, (reading, _) in zip(self.processes, self.pipes, strict=True):
            try:
                found.append(reading.recv() if reading.poll(PATIENCE) else None)
            except EOFError:
                found.append(None)
            process.join(PATIENCE)
            assert process.exitcode is not None, "a rank did not end"
        return found


def commands(size: int, arguments: list[str], folder: Path, **how: Any) -> list[tuple[int, str, str]]:
    """Run `metaopt <arguments>` on so many ranks; return the status, the output and the errors of each."""
    running = Together(size, _command, arguments, str(folder), **how)
    running.end()
    statuses = [process.exitcode for process in running.processes]
    texts = [[(folder / f"rank{rank}.{stream}").read_text() for stream in ("out", "err")] for rank in range(size)]
    return [(status, *text) for status, text in zip(statuses, texts, strict=True)]


def trained(size: int, name: str, spec: str, **how: Any) -> list[dict[str, Any]]:
    """Train on so many ranks; return each rank's whole weights, losses and evaluation."""
    found = Together(size, _train, name, spec, how).end() if size > 1 else [_train(name, spec, how)]
    assert None not in found, "a rank failed: its error is above"
    return found


def _be_rank(env: dict[str, Any], writing: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update({key: str(value) for key, value in env.items()})
    torch.set_num_threads(1)
    writing.send(function(*arguments))


def _command(arguments: list[str], folder: str) -> None:
    os.chdir(folder)
    for number, stream in ((1, "out"), (2, "err")):
        file = os.open(f"rank{os.environ['RANK']}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    warm.fresh_streams()
    main(arguments)


def _train(name: str, spec: str, how: dict[str, Any]) -> dict[str, Any]:
    losses: list[float] = []
    sent: list[int] = []
    all_reduce = torch.distributed.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **how: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, **how)

    torch.distributed.all_reduce = counted
    with joined(this_rank(), "cpu") as ranks:
        problem = registry.find(name, "problem").target(**how.pop("problem", {}))
        result = train(problem, spec, ranks=ranks, progress=lambda _, loss: losses.append(float(loss.detach())), **how)
        weights = {key: whole(p) for key, p in result.model.state_dict().items()}
        return {"weights": weights, "losses": losses, "evaluation": result.evaluation, "sent": sent}


def whole(tensor: torch.Tensor) -> Any:
    """Return a tensor as a numpy array, gathered from its shards."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().numpy()
